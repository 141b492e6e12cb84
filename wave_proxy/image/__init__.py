"""Words of the domain: pure values and functions about images and requests for them."""
