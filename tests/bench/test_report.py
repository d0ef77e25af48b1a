"""Figures reach a document from the result JSON alone."""

import json

import pytest

from ptune_dist.bench.report import fill_document, render_tables
from ptune_dist.errors import UserError

RESULT = {
    "date": "2030-01-02T03:04:05+00:00",
    "code": {"commit": "0123456789abcdef", "changed": True},
    "versions": {"torch": "9.9"},
    "hardware": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 8 << 30, "gpus": []},
    "matrix": {"baseline": "peer"},
    "cases": [
        {
            "name": "speed",
            "about": "how fast",
            "sides": {
                "ours": {"samples_per_s": {"median": 4.0, "min": 3.5, "max": 4.25}},
                "peer": {
                    "samples_per_s": {"median": 2.0, "min": 2.0, "max": 2.0},
                    "peak_memory_bytes": {"median": 3 << 20, "min": 3 << 20, "max": 3 << 20},
                },
            },
            "ratios": {"ours": {"samples_per_s": {"median": 2.0, "pairs": [2.0]}}},
            "agreement": None,
            "runs": [{"others_cpu_share": share} for share in (0.1, 0.5, 0.2)],
        },
        {
            "name": "same",
            "about": "",
            "sides": {"ours": {"steps": {"median": 1, "min": 1, "max": 1}}},
            "ratios": {},
            "agreement": {"measure": "curve", "tolerance": 1e-4, "largest_difference": 2e-6, "agrees": True},
            "runs": [],
        },
    ],
}


def test_a_documents_block_is_filled_from_the_json_beside_it_and_the_rest_stays(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- result r.json -->\nold figures\n<!-- end -->\nafter\n")
    fill_document(document)
    text = document.read_text()
    assert "old figures" not in text and text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "| ours | 4.00 (3.50-4.25) |  |" in text
    assert "| peer | 2.00 | 3 |" in text
    assert "| ours / peer | 2.00x |  |" in text
    assert "Some CPU, 2 cores, 8 GiB" in text and "commit 0123456789ab with changes" in text
    assert "curve differs by 2.0e-06 at most (tolerance 1e-04): the sides agree" in text
    assert "other work took 20% of the machine in the median run, 50% at most" in text
    fill_document(document)
    assert document.read_text() == text


@pytest.mark.parametrize(
    ("text", "said"), [("no block", "no block"), ("<!-- result x.json -->\n<!-- end -->", "cannot read")]
)
def test_a_document_that_cannot_be_filled_is_named(tmp_path, text, said):
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(UserError, match=said):
        fill_document(document)


def test_the_terminal_shows_a_table_per_timed_case_and_says_who_disagrees():
    table, *lines = render_tables(RESULT)
    assert table.title == "speed" and table.row_count == 3
    assert any("the sides agree" in line for line in lines)
    wrong = json.loads(json.dumps(RESULT))
    wrong["cases"][1]["agreement"] |= {"agrees": False, "largest_difference": None}
    assert any("DO NOT AGREE" in line and "cannot be compared" in line for line in render_tables(wrong)[1:])
