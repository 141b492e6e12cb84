"""What lives on disk: verified blobs, manifests and tags, and the fetches that fill them."""
