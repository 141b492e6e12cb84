"""Claim: checking a stream costs no more than hashing it. Kernel and twin of ``Verifier`` over the same chunks."""

from collections.abc import Callable
from hashlib import sha256

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.images import digest_of, random_blob
from tests import oracles
from wave_proxy._fast.digest import Verifier
from wave_proxy.errors import ContentMismatch, DigestMismatch, SizeMismatch

SIZE = 4 << 20
CONTENT = random_blob(SIZE, 1)
DIGEST = digest_of(CONTENT)
Maker = Callable[[str, int], Verifier | oracles.Verifier]
MAKERS: dict[str, Maker] = {"kernel": Verifier, "twin": oracles.Verifier}


def verify(make: Maker, chunks: list[bytes], digest: str) -> None:
    verifier = make(digest, SIZE)
    for chunk in chunks:
        verifier.update(chunk)
    verifier.finish()


def check(make: Maker, chunks: list[bytes]) -> None:
    """Right bytes pass; other ones, or fewer, do not."""
    verify(make, chunks, DIGEST)
    cases: list[tuple[list[bytes], str, type[ContentMismatch]]] = [
        (chunks, digest_of(b""), DigestMismatch),
        (chunks[1:], DIGEST, SizeMismatch),
        ([*chunks, b"x"], DIGEST, SizeMismatch),
    ]
    for wrong, digest, kind in cases:
        with pytest.raises(kind):
            verify(make, wrong, digest)


@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 16, 1 << 20])
@pytest.mark.parametrize("name", ["kernel", "twin", "bare"])
def test_verifier(benchmark: BenchmarkFixture, name: str, chunk_bytes: int) -> None:
    benchmark.group = f"verify 4 MiB in chunks of {chunk_bytes} bytes"
    benchmark.extra_info["bytes"] = SIZE
    chunks = [CONTENT[start : start + chunk_bytes] for start in range(0, SIZE, chunk_bytes)]
    if name == "bare":
        benchmark(bare, chunks)
        return
    check(MAKERS[name], chunks)
    benchmark(verify, MAKERS[name], chunks, DIGEST)


def bare(chunks: list[bytes]) -> str:
    """What the hash alone costs: the floor."""
    running = sha256()
    for chunk in chunks:
        running.update(chunk)
    return running.hexdigest()
