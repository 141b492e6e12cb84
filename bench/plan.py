"""What every scenario works with: how much to measure, taking turns, images, and the check that answers are right."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.clients import check_image
from bench.images import Image, Layer, digest_of, image, random_blob
from bench.peers import ADDED_ENV, WAVE, Peer, Stage
from wave_proxy.image.oci import OCI_LAYER

WORKERS = min(os.cpu_count() or 1, 4)
MB = 1e6

Figures = dict[str, dict[str, list[float]]]  # kind: server: one a round


@dataclass(frozen=True)
class Plan:
    """How much to measure, and an empty folder to do it in."""

    folder: Path
    repeats: int
    quick: bool

    def choose(self, full: int, quick: int) -> int:
        """One of the two."""
        return quick if self.quick else full


def alternate(peers: Sequence[Peer], repeats: int, measure: Callable[[Peer, int], Mapping[str, float]]) -> Figures:
    """Measure each peer in turn, round after round: A B A B. ``measure`` gets the number of the round."""
    figures: Figures = {}
    for round_ in range(repeats):
        for peer in peers:
            for kind, value in measure(peer, round_).items():
                figures.setdefault(kind, {}).setdefault(peer.name, []).append(value)
    return figures


def blob_image(size: int, seed: int) -> Image:
    """An image of one layer of random bytes, as if it were compressed."""
    content = random_blob(size, seed)
    digest = digest_of(content)
    return image([Layer(digest, content, OCI_LAYER, digest)])


def small_image(seed: int) -> Image:
    """An image of five layers of 20 kB."""
    layers = [blob_image(20_000, 10 * seed + number).layers[0] for number in range(5)]
    return image([Layer(item.digest, item.content, item.media_type, item.digest) for item in layers])


def check_all(made: Stage) -> None:
    """Pull every image from every peer, which makes them warm too. Raises AssertionError."""
    for peer in made.peers:
        for sample in made.samples:
            pulled = check_image(peer, sample)
            settings = pulled.config["config"]["Env"]
            assert (ADDED_ENV in settings) == (peer.name == WAVE), f"{peer.name} serves other settings: {settings}"


def failures_of(peer: Peer, errors: Sequence[str]) -> list[str]:
    """A note when clients of a peer failed (their errors are texts, empty for none)."""
    failed = [error for error in errors if error]
    return [f"{peer.name}: {len(failed)} of {len(errors)} clients failed, one with: {failed[0]}"] if failed else []
