"""Local repositories that one user alone may pull from, by their names: images that were built of private ones."""

_PRIVATE = "private"


def private_folder(local: str, key: str) -> str:
    """What the names of the local repositories of the user with that key begin with; ``local`` is that of all."""
    return f"{local}/{_PRIVATE}/{key}"


def private_repository(local: str, key: str) -> str:
    """Where builds of the user with that key go; ``local`` is what the names of local repositories begin with."""
    return f"{private_folder(local, key)}/build"


def owner_of(name: str) -> str:
    """The key of the user whom a local repository belongs to, by its name behind ``local/``; empty for everybody's.

    Of a name that is no user's, but stands where these do, the owner is somebody whom nobody is.
    """
    first, _, rest = name.partition("/")
    return (rest.partition("/")[0] or "nobody") if first == _PRIVATE else ""
