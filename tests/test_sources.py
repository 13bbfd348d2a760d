import csv
import gzip
import json

import pytest
from conftest import as_messages, preference_rows
from datasets import Dataset, DatasetDict
from hypothesis import example, given
from hypothesis import strategies as st

from trl_ssrm.io.sources import load_data, load_splits


ROWS = preference_rows(3)


def write_csv(path, rows, separator=","):
    lines = [separator.join(rows[0]), *(separator.join(f'"{value}"' for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_same_rows_from_every_format(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_json(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    write_csv(tmp_path / "rows.csv", ROWS)
    write_csv(tmp_path / "rows.tsv", ROWS, "\t")
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    write_csv(tmp_path / "folder" / "train.csv", ROWS)
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "saved", "folder"):
        assert load_data(str(tmp_path / name)).to_list() == ROWS, name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_compressed_text_is_read_as_the_file_that_it_holds(name, tmp_path):
    write_csv(tmp_path / "rows.csv", ROWS)
    write_csv(tmp_path / "rows.tsv", ROWS, "\t")
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    for compressed in (tmp_path / f"{name}.gz", tmp_path / "folder" / f"train.{name.split('.')[1]}.gz"):
        compressed.parent.mkdir(exist_ok=True)
        compressed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert load_data(str(tmp_path / f"{name}.gz")).to_list() == ROWS
    assert load_data(str(tmp_path / "folder")).to_list() == ROWS


def unquoted(rows: list[dict]) -> str:
    """As many tools write TSV: tabs between the texts, and every other character as it is."""
    return "\n".join("\t".join(values) for values in [rows[0], *(row.values() for row in rows)]) + "\n"


def test_text_that_begins_with_a_quote_swallows_no_rows(tmp_path):
    rows = preference_rows(20)
    rows[5]["chosen"] = '"kind' + rows[5]["chosen"]
    rows[11]["chosen"] += ' he said"'
    (tmp_path / "rows.tsv").write_text(unquoted(rows), encoding="utf-8")
    assert load_data(str(tmp_path / "rows.tsv")).to_list() == rows


FIELDS = st.text('ab", \r\n', max_size=6)


@example(table=[['"a', 'b"'], ["a", "b"]], quoting="minimal")
@example(table=[["a\nb", 'say "a"'], ["a", "b"]], quoting="minimal")
@example(table=[['say "a"', '"a" he said'], ["a", "b"]], quoting="none")
@given(
    table=st.lists(st.lists(FIELDS, min_size=2, max_size=2), min_size=1, max_size=5),
    quoting=st.sampled_from(["none", "minimal", "all", "comma"]),
)
def test_rows_of_a_table_are_those_that_were_written(tmp_path_factory, table, quoting):
    # A line without any text, and empty lines, are no rows.
    rows = [{"chosen": f"x{one}", "rejected": other} for one, other in table]
    path = tmp_path_factory.mktemp("table") / ("rows.csv" if quoting == "comma" else "rows.tsv")
    if quoting == "none":
        # Text in quotes as a whole would be taken for a quoted field.
        rows = [{name: f"{text}.".translate({10: "", 13: ""}) for name, text in row.items()} for row in rows]
        path.write_text(unquoted(rows), encoding="utf-8", newline="")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            kind = csv.QUOTE_ALL if quoting == "all" else csv.QUOTE_MINIMAL
            writer = csv.DictWriter(
                file, ["chosen", "rejected"], delimiter="," if quoting == "comma" else "\t", quoting=kind
            )
            writer.writeheader()
            writer.writerows(rows)
    assert load_data(str(path)).to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.csv",
            "prompt;chosen;rejected\na;b;c\n",
            "separated by semicolons, where its name says commas; save it",
        ),
        ("rows.csv", "prompt\tchosen\trejected\na\tb\tc\n", "separated by tabs, where .* commas; name it .tsv"),
        ("rows.tsv", "prompt,chosen,rejected\na,b,c\n", "separated by commas, where its name says tabs; save it"),
        (
            "rows.csv",
            'chosen,rejected\na,b\n"Yes" he said,b\na,b\n',
            "begins with a quote in line 3 does not end with",
        ),
        ("rows.csv", 'chosen,rejected\n"Yes,b\na,b\na,b\n', "begins with a quote in line 2 does not end with one"),
        ("rows.tsv", '"chosen"\t"rejected"\n"a"\t"say "b" now"\n', "begins with a quote in line 2 does not end with"),
    ],
)
def test_table_that_would_lose_rows_or_columns_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_text(content, encoding="utf-8")
    for path in (tmp_path / name, tmp_path / "folder"):
        with pytest.raises(ValueError, match=f"{path.name} can't be read, or has no rows: .*{message}"):
            load_data(str(path))


def test_tables_of_other_layouts_are_not_read_together(tmp_path):
    write_csv(tmp_path / "one.csv", ROWS)
    write_csv(tmp_path / "two.tsv", ROWS, "\t")
    with pytest.raises(
        ValueError, match=r"two.tsv and one.csv have other columns, delimiters or quotes; put them into"
    ):
        load_data(str(tmp_path))


def test_conversations_from_json_lines(tmp_path):
    rows = [as_messages(row) for row in ROWS]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    assert load_data(str(tmp_path / "rows.jsonl")).to_list() == rows


@pytest.mark.parametrize("name", ["rows.csv", "folder/train.csv"])
def test_csv_is_text_whatever_it_looks_like(name, tmp_path):
    row = {"prompt": "2 + 2,\n or\n3?", "chosen": "4", "rejected": "NA", "margin": "2"}
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    # As spreadsheets write it.
    path.write_text(
        '\ufeff"prompt","chosen","rejected","margin"\n"2 + 2,\n or\n3?",4,NA,2\n7,,null,1\n', encoding="utf-8"
    )
    rows = load_data(str(path if name == "rows.csv" else path.parent)).to_list()
    assert rows == [{**row, "margin": 2.0}, {"prompt": "7", "chosen": "", "rejected": "null", "margin": 1.0}]


def test_splits(tmp_path):
    parts = {name: Dataset.from_list([{"number": number}]) for number, name in enumerate(("train", "test"))}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    for name, part in parts.items():
        part.to_json(tmp_path / "folder" / f"{name}.jsonl")
    for name in ("saved", "folder"):
        path = str(tmp_path / name)
        assert set(load_splits(path)) == {"train", "test"}
        assert [load_data(path, split)["number"][:] for split in (None, "test")] == [[0], [1]]
        with pytest.raises(ValueError, match="has no split 'dev'; it has 'train', 'test'"):
            load_data(path, "dev")
    # A file is one split, whatever it is called.
    assert load_data(str(tmp_path / "folder" / "test.jsonl"), "test")["number"][:] == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", b"PK", r"rows.xlsx ends with '.xlsx'; a data file ends with one of .jsonl, "),
        ("rows.jsonl", b"", "rows.jsonl can't be read, or has no rows: it is empty"),
        ("rows.jsonl", b"\n\n", "rows.jsonl can't be read, or has no rows"),
        (
            "rows.jsonl",
            b'{"prompt": "a"}\n{"prompt": \n',
            "rows.jsonl can't be read, or has no rows: JSON parse error",
        ),
        ("rows.csv", b"prompt,chosen,rejected\n", "rows.csv can't be read, or has no rows"),
        (
            "rows.csv",
            b"prompt,chosen,rejected\na,b,c\na,b,c,d\n",
            "rows.csv can't.*Expected 3 fields in line 3, saw 4",
        ),
        ("rows.csv", b"prompt,chosen,rejected\n\xff\xfe,b,c\n", "rows.csv can't.*codec can't decode byte 0xff"),
        ("rows.parquet", b"PAR", "rows.parquet can't be read, or has no rows: Parquet file size is 3 bytes"),
    ],
)
def test_file_that_is_no_data_is_named_in_one_sentence(name, content, message, tmp_path, caplog):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_data(str(tmp_path / name))
    assert "\n" not in str(raised.value) and not caplog.text


def test_what_is_not_there(tmp_path):
    for name in (str(tmp_path / "none"), "./none", "none.csv", "one/two/three"):
        with pytest.raises(ValueError, match=r"There is no file or folder .*; check the path\."):
            load_data(name)
    with pytest.raises(
        ValueError, match="org/none is no file or folder here, and the hub gave no dataset of that name"
    ):
        load_data("org/none")
    with pytest.raises(ValueError, match=r"can't be read, or has no rows: none of its files ends with one of .jsonl"):
        load_data(str(tmp_path))
