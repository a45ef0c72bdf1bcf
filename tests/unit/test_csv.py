import numpy as np
import pytest

from neurobayes import csv_files, tabular
from neurobayes.errors import DataError, OptionError


@pytest.fixture
def write(tmp_path):
    def write(text, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def encoded(path, target="y", **options):
    table = csv_files.read(path)
    encoding = tabular.encode(table, target, **options)
    return encoding, *encoding.transform(table)


# Reading


@pytest.mark.parametrize(
    "content",
    [
        "a,b,y\n1,2,3\n4,5,6\n",
        "a;b;y\n1;2;3\n4;5;6\n",
        "a\tb\ty\n1\t2\t3\n4\t5\t6\n",
        "a,b,y\r\n1,2,3\r\n4,5,6\r\n",
        b"\xef\xbb\xbfa,b,y\n1,2,3\n4,5,6",
        '"a", b ,y\n"1",2 ,3\n\n4,5,"6"\n\n',
    ],
    ids=["comma", "semicolon", "tab", "crlf", "bom", "quotes-blanks"],
)
def test_dialects_read_the_same(write, content):
    encoding, X, y = encoded(write(content))
    assert encoding.feature_names == ("a", "b")
    assert X.tolist() == [[1, 2], [4, 5]] and y.tolist() == [3, 6]
    assert X.dtype == y.dtype == np.float64


def test_quoted_fields_may_hold_delimiters_and_line_breaks(write):
    table = csv_files.read(write('kind,y\n"a, ""b""",1\n"two\nlines",2\nplain,3\n'))
    assert table.columns["kind"] == ['a, "b"', "two\nlines", "plain"]
    assert table.lines == [2, 3, 5]


def test_decimal_commas_do_not_mislead_the_delimiter(write):
    table = csv_files.read(write("a;y\n1,5;2,5\n3,5;4,5\n"))
    assert table.columns == {"a": ["1,5", "3,5"], "y": ["2,5", "4,5"]}
    with pytest.raises(DataError, match=r"column 'y' line 2: '2,5' is not a finite number.*with a point"):
        tabular.encode(table, "y", task="regression").transform(table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,y\n", "a header but no rows"),
        ("a,b,a\n1,2,3\n", "columns 1 and 3 are both named 'a'"),
        (",a,y\n0,1,2\n", r"column 1 has no name.*index=False"),
        ("a,b,y\n1,2,3\n1,2\n", "line 3 has 2 fields but the header has 3"),
        ("a,b,y\n1,2,3,4\n", "line 2 has 4 fields but the header has 3"),
        (b"a,y\n\xff\xfe,1\n", "not UTF-8"),
        ('a,y\n"1,2\n3,4\n', "cannot be read as CSV"),
    ],
)
def test_unreadable_files_raise_one_clear_error(write, content, message):
    with pytest.raises(DataError, match=message):
        csv_files.read(write(content))


def test_absent_file_and_directory_raise(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        csv_files.read(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="cannot be read"):
        csv_files.read(tmp_path)


# Encoding


def test_text_columns_become_one_hot_and_constant_ones_are_dropped(write):
    content = "size,kind,unit,batch,y\n1,red,mm,7,1.5\n2,blue,mm,7.0,2.5\n3,red,mm,7e0,3.5\n"
    encoding, X, y = encoded(write(content))
    assert encoding.feature_names == ("size", "kind=blue", "kind=red")
    assert X.tolist() == [[1, 0, 1], [2, 1, 0], [3, 0, 1]] and y.tolist() == [1.5, 2.5, 3.5]
    assert encoding.task == "regression" and encoding.dropped == ("unit", "batch")
    assert encoding.notes == ("Left out, because constant: unit, batch.",)


@pytest.mark.parametrize("token", ["", "NA", "n/a", "NaN", "null", "None", "?", "  ", "#N/A", "#DIV/0!", "#NAME?"])
def test_missing_values_name_column_and_line(write, token):
    path = write(f"a,kind,y\n1,red,1\n2,blue,{token}\n{token},red,3\n4,{token},4\n{token},blue,5\n")
    message = r"4 missing values: column 'y' line 3, column 'a' line 4, column 'kind' line 5, …\."
    with pytest.raises(DataError, match=message):
        tabular.encode(csv_files.read(path), "y")


def test_one_missing_value_in_an_ignored_column_does_not_matter(write):
    encoding, X, _ = encoded(write("a,note,y\n1,,1\n2,x,2\n"), ignore=["note"])
    assert encoding.ignored == ("note",) and X.shape == (2, 1)


@pytest.mark.parametrize("junk", ["abc", "inf", "1_000", "1e999", "12 mm"])
def test_junk_among_numbers_names_column_line_and_value(write, junk):
    path = write(f"a,b,y\n1,2,1\n3,{junk},2\n4,5,3\n")
    with pytest.raises(DataError, match=f"column 'b' line 3: '{junk}' is not a finite number"):
        tabular.encode(csv_files.read(path), "y")


@pytest.mark.parametrize("columns", ["a;y", "y;a"])
def test_columns_of_decimal_commas_are_no_text(write, columns):
    rows = "".join(f"{i},5;{i}\n" for i in range(80))
    with pytest.raises(
        DataError, match=rf"column '{columns[0]}' line 2: '0,5' is not a finite number.* with a point \(80 values"
    ):
        tabular.encode(csv_files.read(write(f"{columns}\n{rows}")), "y")


def test_classes_may_have_commas_where_they_are_asked_for(write):
    encoding, *_ = encoded(write("a;y\n1;1,5\n2;2,5\n3;1,5\n"), task="classification")
    assert encoding.classes == ("1,5", "2,5")


def test_infinite_values_are_called_so(write):
    with pytest.raises(DataError, match=r"'inf' is not a finite number\. Infinite values.*column\.$"):
        tabular.encode(csv_files.read(write("a,y\n1,1\ninf,2\n4,3\n")), "y")


def test_junk_in_a_numeric_target_is_not_taken_for_classes(write):
    path = write("a,y\n1,1\n3,oops\n4,3\n")
    table = csv_files.read(path)
    with pytest.raises(DataError, match="column 'y' line 3: 'oops'"):
        tabular.encode(table, "y").transform(table)


def test_absent_target_names_the_nearest_and_lists_the_columns(write):
    table = csv_files.read(write("length,strength\n1,2\n3,4\n"))
    with pytest.raises(
        DataError, match=r"no column 'strenght' \(closest: 'strength'\)\. Its columns: length, strength"
    ):
        tabular.encode(table, "strenght")
    with pytest.raises(DataError, match=r"no column 'lenght' \(closest: 'length'\)"):
        tabular.encode(table, "strength", ignore=["lenght"])
    with pytest.raises(DataError, match="is the target"):
        tabular.encode(table, "strength", ignore=["strength"])


def test_too_many_categories_raise(write):
    rows = "".join(f"id{i},{i}\n" for i in range(tabular.MAX_CATEGORIES + 1))
    with pytest.raises(DataError, match="column 'name' has 31 distinct text values, more than the 30"):
        tabular.encode(csv_files.read(write("name,y\n" + rows)), "y")


def test_nothing_to_predict_from_raises(write):
    with pytest.raises(DataError, match="no column to predict 'y' from"):
        tabular.encode(csv_files.read(write("a,y\n1,2\n1,3\n")), "y")


# Targets


def test_text_targets_are_classes(write):
    encoding, _, y = encoded(write("a,y\n1,dog\n2,cat\n3,dog\n"))
    assert encoding.task == "classification" and encoding.classes == ("cat", "dog")
    assert y.tolist() == [1, 0, 1] and y.dtype == np.int32


def test_numeric_targets_are_classes_only_on_request(write):
    path = write("a,y\n1,10\n2,2\n3,2.0\n4,10\n")
    encoding, _, y = encoded(path)
    assert encoding.task == "regression" and y.tolist() == [10, 2, 2, 10]
    assert "2 distinct whole numbers" in encoding.notes[0] and "--task classification" in encoding.notes[0]
    encoding, _, y = encoded(path, task="classification")
    assert encoding.classes == ("2", "10") and y.tolist() == [1, 0, 0, 1] and encoding.notes == ()


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["x"] * 3, "a single class, 'x'"), ([f"c{i}" for i in range(51)], "51 distinct classes, more than 50")],
)
def test_impossible_classes_raise(write, labels, message):
    content = "a,y\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels))
    with pytest.raises(DataError, match=message):
        tabular.encode(csv_files.read(write(content)), "y")


def test_text_target_as_regression_raises(write):
    table = csv_files.read(write("a,y\n1,dog\n2,cat\n"))
    with pytest.raises(DataError, match=r"column 'y' line 2: 'dog' is not a finite number \(and 1 more"):
        tabular.encode(table, "y", task="regression").transform(table)


def test_a_single_row_raises(write):
    with pytest.raises(DataError, match="only 1 row of data"):
        tabular.encode(csv_files.read(write("a,y\n1,2\n")), "y")


def test_unknown_task_raises(write):
    with pytest.raises(OptionError, match=r"task='classify' is not known \(closest: 'classification'\)"):
        tabular.encode(csv_files.read(write("a,y\n1,2\n3,4\n")), "y", task="classify")


# A second file


def test_test_file_may_order_its_columns_differently(write):
    encoding, X, y = encoded(write("a,kind,y\n1,red,1\n2,blue,2\n"))
    again = encoding.transform(csv_files.read(write("y;kind;a\n1;red;1\n2;blue;2\n", "test.csv")))
    assert np.array_equal(X, again[0]) and np.array_equal(y, again[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,y\n1,dog\n", "has no column 'kind'"),
        ("a,kinds,y\n1,red,dog\n", r"has no column 'kind' \(closest: 'kinds'\)"),
        ("a,kind,y,z\n1,red,dog,2\n", "a column 'z' that the training file lacks"),
        ("a,kind,y\n1,red,dog\n1,rad,dog\n", r"column 'kind' line 3: the category 'rad' .*closest: 'red'"),
        ("a,kind,y\n1,red,cow\n", "column 'y' line 2: the class 'cow' does not occur"),
        ("a,kind,y\nx,red,dog\n", "column 'a' line 2: 'x' is not a finite number"),
        ("a,kind,y\n1,,dog\n", "1 missing value: column 'kind' line 2"),
    ],
)
def test_test_file_that_does_not_fit_raises(write, content, message):
    encoding, _, _ = encoded(write("a,kind,y\n1,red,dog\n2,blue,cat\n"))
    with pytest.raises(DataError, match=message):
        encoding.transform(csv_files.read(write(content, "test.csv")))


def test_taking_rows_keeps_their_lines(write):
    table = csv_files.read(write("a,y\n1,5\n2,6\n3,7\n")).take(np.array([2, 0]))
    assert table.columns == {"a": ["3", "1"], "y": ["7", "5"]} and table.lines == [4, 2] and len(table) == 2
