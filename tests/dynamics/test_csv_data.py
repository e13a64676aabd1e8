import numpy as np
import pytest

from jaxopt_lab.dynamics.loop.csv_data import read_csv


def write(tmp_path, text):
    path = tmp_path / "data.csv"
    path.write_text(text)
    return path


def test_header_and_a_target_by_name(tmp_path):
    data = read_csv(write(tmp_path, "a,price,b\n1,2,3\n4,5.5,6\n"), target="price")
    np.testing.assert_array_equal(data.x, [[1.0, 3.0], [4.0, 6.0]])
    np.testing.assert_array_equal(data.y, [2.0, 5.5])
    assert data.names == ("a", "b", "price") and data.x.dtype == np.float64


@pytest.mark.parametrize("text", ["1,2\n3,4\n\n", "1;2\r\n3;4\r\n", "\ufeff1\t2\n3\t4"])
def test_without_a_header_the_last_column_is_the_target(tmp_path, text):
    data = read_csv(write(tmp_path, text))
    assert data.names == ("1", "2") and data.y.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    "text, target, message",
    [
        ("a,b\n1,2\n3,nan\n", None, r"row 3, column 'b': got 'nan'"),
        ("a,b\n1,2\n\n3,x\n", None, r"row 4, column 'b': got 'x'"),
        ("1,2\n3,\n", None, r"row 2, column '2': got ''"),
        ("1,2\ninf,4\n", None, r"row 2, column '1': got 'inf'"),
        ("a,b\n1,2\n3,4,5\n", None, r"row 3: got 3 cells, expected 2"),
        ("a,b\n1,7\n3,7\n", None, r"target column 'b' is constant \(7\)"),
        ("a,b\n1,2\n3,4\n", "c", r"target: got 'c', expected one of a, b"),
        ("a,a\n1,2\n3,4\n", None, r"column 'a' stands in the header more than once"),
        ("a,b\n1,2\n", None, r"got 1 rows of data"),
        ("1\n2\n", None, r"got 1 column"),
        ("\n\n", None, r"the file is empty"),
        ('1,"2\n3,4\n', None, r"expected UTF-8 text with separated columns"),
    ],
)
def test_mistakes_are_named_with_file_row_and_column(tmp_path, text, target, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(write(tmp_path, text), target)
    assert "data.csv" in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="UTF-8"):
        read_csv(path)
