"""The port: HTTP, routing, and the order of the stages of a pull."""
