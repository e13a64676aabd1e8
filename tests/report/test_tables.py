import pytest

from jaxopt_lab.report import format_table


def test_numbers_of_a_column_are_aligned_at_the_point():
    table = format_table(
        ["optimizer", "ms", "bytes"], [["adamw", 0.875, 1024], ["muon", 14.5, 2_000_000]]
    )
    assert table.splitlines() == [
        "optimizer      ms      bytes",
        "---------  ------  ---------",
        "adamw       0.875      1,024",
        "muon       14.500  2,000,000",
    ]


def test_markdown():
    table = format_table(["name", "x"], [["a", 1.5], ["b", None]], markdown=True)
    assert table.splitlines() == [
        "| name |   x |",
        "| ---- | --: |",
        "| a    | 1.5 |",
        "| b    |   - |",
    ]


def test_wide_ranges_keep_their_small_values():
    table = format_table(["x"], [[1e-6], [2.5e4]])
    assert table.splitlines()[2:] == ["  1e-06", "2.5e+04"]


def test_a_row_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match="row 1: 1 cells for 2 headers"):
        format_table(["a", "b"], [[1, 2], [3]])


def test_no_rows():
    assert format_table(["a", "bc"], []) == "a  bc\n-  --"
