"""Layers and build contexts as the clients pack them: whole archives, down to the bits that differ from GNU tar's."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from hashlib import sha256
from tarfile import BLOCKSIZE, DIRTYPE, PAX_FORMAT, REGTYPE, TarInfo
from typing import Any

Files = Mapping[str, bytes | str]

_HEAD = bytes.fromhex("1f8b08000000000000ff")  # no time, no flags, of an unknown system
_MODE, _CHECKSUM = slice(100, 108), slice(148, 156)


def pack(files: Files, *, folders: bool = False) -> dict[str, Any]:
    """The four members that stand for a folder's content.

    The command line has regular files alone, with what kind of file it is in their modes; Nextflow's plugin has
    ``folders`` as well.
    """
    content = b"".join(_entries(files, folders=folders)) + bytes(2 * BLOCKSIZE)
    packed = _gzip(content)
    return {
        "gzipDigest": _digest(packed),
        "gzipSize": len(packed),
        "location": f"data:{b64encode(packed).decode()}",
        "tarDigest": _digest(content),
    }


def _entries(files: Files, *, folders: bool) -> Iterator[bytes]:
    seen = set()
    for name, content in files.items():
        parts = name.split("/")
        for count in range(1, len(parts)):
            folder = "/".join(parts[:count])
            if folders and folder not in seen:
                seen.add(folder)
                yield _header(f"{folder}/", DIRTYPE, 0o040755, 0)
        data = content.encode() if isinstance(content, str) else content
        yield _header(name, REGTYPE, 0o100755 if folders else 0o100644, len(data))
        yield data + bytes(-len(data) % BLOCKSIZE)


def _header(name: str, kind: bytes, mode: int, size: int) -> bytes:
    """As Python writes it, but for the mode, of which Python leaves the file's kind out."""
    info = TarInfo(name)
    info.type, info.size, info.uname, info.gname = kind, size, "root", "root"
    *before, last = _blocks(info.tobuf(PAX_FORMAT))
    block = bytearray(last)
    block[_MODE] = b"%07o\0" % mode
    block[_CHECKSUM] = b" " * 8
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return b"".join(before) + bytes(block)


def _blocks(content: bytes) -> list[bytes]:
    return [content[start : start + BLOCKSIZE] for start in range(0, len(content), BLOCKSIZE)]


def _gzip(content: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return _HEAD + deflate.compress(content) + deflate.flush() + struct.pack("<II", zlib.crc32(content), len(content))


def _digest(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"
