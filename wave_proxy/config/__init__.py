"""The settings: one frozen object, read once from a TOML file and the environment, which wins, and handed down.

Only ``__main__`` modules read it; everything else is handed the values that it needs. Nothing is imported here: a child
process, which gets the settings handed down, does without what validates them.
"""
