"""Builder worker: claims builds and runs them."""
