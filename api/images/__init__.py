"""Images as their registries have them: looked into, and shown."""
