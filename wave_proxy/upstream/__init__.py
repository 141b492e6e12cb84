"""The world that we fetch from: guarded outgoing HTTP, registries and their credentials."""
