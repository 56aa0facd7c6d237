"""The report in a real browser: headless Chromium, light and dark, at a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptedge.quantize.report import BundleReport, Difference, Guess, Piece, ReportData
from gptedge.quantize.report_page import page
from gptedge.quantize.report_runs import MEASURES, RunReport
from gptedge.quantize.report_weights import WeightError
from tests.browser import PAPER, assert_readable, chromium, flags, framed, needs_chromium, probe, read_png

pytestmark = [pytest.mark.slow, needs_chromium]
WIDTHS = (390, 1280)


def sample() -> ReportData:
    """Numbers as a small model has them, thirty layers wide."""
    kinds = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")

    def bundle(name: str, size: float, kl: float | None, error: float) -> BundleReport:
        weights = [
            WeightError(
                f"blocks.{i}.{k}.weight", i, k, "4-bit, blocks of 32", error * (1 + i / 30) if i else None, False
            )
            for i in range(30)
            for k in kinds
        ]
        pieces = [Piece(f" word{i}\n" if i == 9 else f" word{i}", i / 5 if i > 5 else None) for i in range(40)]
        difference = Difference(300, " word20", 4.0, Guess(" the", 0.6, 0.03), Guess("\n", 0.4, 1e-5), pieces, 20)
        return BundleReport(
            name=name, path=name, recipe=name, is_reference=kl is None, size_mb=size, decode_tokens_per_s=5000 / size,
            perplexity=12.3, ppl_increase=kl or 0.0, ppl_increase_interval=(0.01, 0.02) if kl else None,
            kl_divergence={"mean": kl, "median": kl, "p99": 3 * kl, "max": 9 * kl} if kl else None,
            top1_agreement=0.9 if kl else None, weights=weights if kl else [],
            differences=[difference] * 3 if kl else [],
        )  # fmt: skip

    bundles = [
        bundle("a-model-of-fp32", 538.2, None, 0),
        bundle("a-model-of-int8", 139.2, 0.0077, 0.006),
        bundle("a-model-of-int4", 90.9, 0.218, 0.07),
        bundle("another-of-int4", 91.5, 0.2, 0.08),
    ]
    curve = [(i, 8 / (1 + i / 50)) for i in range(1, 400)]
    run = RunReport("run", "run", 399, 0.9, 1.0, curve, curve[::40], dict.fromkeys(MEASURES, curve))
    return ReportData("a-model-of-fp32", "a text", 4080, "0" * 16, 2, "CPU", bundles, [run])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as it is, and for each width one that measures itself in a frame."""
    folder = tmp_path_factory.mktemp("report")
    html = page(sample(), version="1")
    (folder / "page.html").write_text(html)
    for width in WIDTHS:
        (folder / f"{width}.html").write_text(framed(html, width))
    return folder


@pytest.mark.parametrize("scheme", PAPER)
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_can_be_read(folder: Path, width: int, scheme: str) -> None:
    seen = probe(folder, f"{width}.html", scheme)
    assert seen["seen"] > 300
    assert_readable(seen, width, scheme)


@pytest.mark.parametrize("scheme", PAPER)
def test_screenshot(folder: Path, scheme: str) -> None:
    picture = folder / f"{scheme}.png"
    chromium(folder, f"--screenshot={picture}", *flags(scheme), f"file://{folder}/page.html")
    width, height, corner, colours = read_png(picture)
    assert (width, height) == (1280, 2400)
    assert corner == PAPER[scheme]
    assert colours > 100, "an empty page has one or two"
