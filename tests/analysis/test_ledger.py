"""The ledger: complete, checked, and matched to nothing that it is not about."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from synthetic_store import cells, write_cell

from dfqbench.analysis.ledger import Claim, Ledger, Published, load_ledger
from dfqbench.errors import UserError
from dfqbench.files import shipped
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.store import Store
from dfqbench.sweep.cell import Cell, EvaluationCard

FOLDER = shipped("results")
HEAD = "dataset,model,w_bits,a_bits,method,top1,fp_top1,source\n"


def claim(**changes: Any) -> Claim:
    return Claim(
        **{"dataset": "CIFAR-10", "network": "ResNet-20", "bits": "w4a4", "method": "GDFQ", "top1": 90.0, "full_precision": 93.9, "source": "a paper"}
        | changes
    )


def with_claims(*claims: Claim) -> Ledger:
    return Ledger(list(claims), load_ledger().names, {})


def test_the_committed_ledger_passes_all_checks_and_every_allowance_has_a_reason() -> None:
    ledger = load_ledger()
    assert len(ledger.claims) == 564
    assert ledger.problems() == []
    assert len(ledger.allowed) == 11
    assert all(len(reason) > 20 for reason in ledger.allowed.values())


def test_conflicting_claims_stay_and_are_disputes() -> None:
    disputes = {claim.key: found for found in load_ledger().disputes for claim in found.claims}
    hast = disputes["CIFAR-10", "ResNet-20", "w3a3", "HAST"]
    assert str(hast) == "86.34-88.34"
    assert len({claim.source for claim in hast.claims}) == 2


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ([claim(method="GDFQQ")], "unknown method: 'GDFQQ' is not in published-names.csv"),
        ([claim(network="ResNet-21")], "unknown network"),
        ([claim(dataset="CIFAR")], "unknown dataset"),
        ([claim(top1=94.0)], "above full precision: 94.00 of 93.90"),
        ([claim(top1=101.0, full_precision=None)], "not a percentage"),
        ([claim(source=" ")], "no source"),
        ([claim(), claim(bits="w5a5", top1=89.0)], "bits not monotone: 90.00 at w4a4, 89.00 at w5a5"),
    ],
)
def test_a_row_that_breaks_a_check_is_named(claims: list[Claim], said: str) -> None:
    (problem,) = with_claims(*claims).problems()
    assert said in problem


def test_bits_need_not_be_monotone_across_sources_or_incomparable_widths() -> None:
    assert with_claims(claim(), claim(bits="w5a5", top1=89.0, source="another")).problems() == []
    assert with_claims(claim(bits="w4a8"), claim(bits="w5a5", top1=89.0)).problems() == []


def test_an_allowance_that_nothing_needs_is_named() -> None:
    ledger = load_ledger()
    spare = dataclasses.replace(ledger, allowed=ledger.allowed | {("above full precision", "CIFAR-10", "ResNet-20", "w4a4", "GDFQ", "x"): "why"})
    (problem,) = spare.problems()
    assert "it breaks nothing" in problem


def test_the_distance_is_from_the_nearest_claim() -> None:
    found = Published((claim(top1=90.0), claim(top1=91.0)))
    assert [found.distance(v) for v in (89.0, 90.4, 92.0)] == pytest.approx([-1.0, 0.0, 1.0])


@pytest.mark.parametrize(("file", "text", "said"), [
    ("published.csv", "a,b\n", "the columns dataset, model"),
    ("published.csv", HEAD + "CIFAR-10,ResNet-20,4,4,GDFQ,high,,x\n", "published.csv:2: could not convert"),
    ("published.csv", HEAD + "CIFAR-10,ResNet-20,4\n", "published.csv:2: 8 values"),
    ("published-names.csv", "kind,name,here\nmethods,GDFQ,gdfq\n", "published-names.csv:2: 'methods' is none of dataset, network, method"),
])  # fmt: skip
def test_a_broken_file_is_one_line_with_its_place(tmp_path: Path, file: str, text: str, said: str) -> None:
    for path in FOLDER.glob("published*.csv"):
        shutil.copy(path, tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=said):
        load_ledger(tmp_path)


def papers_cell(
    tmp_path: Path, name: str = "cifar10", images: int = 10_000, teacher_top1: float = 94.03, protocol: str = "lineage", **changed: Any
) -> dict[str, Any]:
    """GDFQ on what the papers used, with some things changed."""
    first = next(iter(cells(1)))
    teacher = dataclasses.replace(first.teacher, model="pytorchcv:resnet20_cifar10", weights="zoo")
    card = EvaluationCard(name, "ab" * 32, 10, images)
    cell = Cell("gdfq", 1, {"batch_size": 200, **changed}, teacher, card, PROTOCOLS[protocol], Bits(4, 4), 0, "fp32", changed=changed)
    result = write_cell(Store(tmp_path), cell, images)
    result["teacher"]["top1"] = teacher_top1
    return result


def test_the_papers_cell_is_matched_and_nothing_else(tmp_path: Path) -> None:
    ledger = load_ledger()
    found, why = ledger.published(papers_cell(tmp_path))
    assert (str(found), why) == ("90.11-90.25", "")
    for changes, said in [
        ({"name": "cifar10-jpeg"}, "no published number is about this test set"),
        ({"images": 5000}, "no published number is about this test set"),
        ({"teacher_top1": 87.44}, "a teacher of 93.89 or 94.03 %"),
        ({"protocol": "hardware"}, "another protocol"),
        ({"bn_weight": 1.0}, ""),
    ]:
        found, why = ledger.published(papers_cell(tmp_path, **changes))  # type: ignore[arg-type]
        assert found is None
        assert said in why


def test_every_row_of_the_file_is_a_claim_with_its_source() -> None:
    with open(FOLDER / "published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == [claim.top1 for claim in load_ledger().claims]
    assert all(row["source"] for row in rows)
