"""The documents in files, read as what their suffix says: text, or rows with a field of text; compressed or not."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from slicegpt_fast.errors import InputError, reason

TEXT_SUFFIXES = (".txt", ".md")  # what a folder is searched for; a file that is named itself may end in anything
TEXT_FIELD = "text"  # the field of rows that is read where none is named
DELIMITERS = ",\t;|"

Columns = dict[str, list[Any]]  # the values of each field, None where a row has none
OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FORMATS = "text, .json, .jsonl, .csv, .tsv or .parquet"


def text_documents(paths: Iterable[str | Path], field: str | None = None) -> list[str]:
    """Return the documents of files, in the order given; a folder stands for its .txt and .md files, sorted.

    A file of rows (.json, .jsonl, .ndjson, .csv, .tsv, .parquet) has a document per row; any other file is one. All but
    .parquet may be compressed (.gz, .bz2, .xz).

    Args:
        paths: files, and folders, which are searched at any depth.
        field: the field of rows that holds the text; by default "text", or else the only one of strings.

    Raises:
        InputError: a path does not exist, a folder holds no text file, a file is not what its suffix says or is not
            UTF-8, or its rows have no such field.
    """
    return [document for path in paths for file in _files(Path(path).expanduser()) for document in _read(file, field)]


def text_field(asked: str | None, texts: Sequence[str]) -> str | None:
    """Return which of the fields of strings is read: the one asked for, "text", or else the only one; None for none."""
    if (asked or TEXT_FIELD) in texts:
        return asked or TEXT_FIELD
    return texts[0] if asked is None and len(texts) == 1 else None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"text {path} does not exist: give text files or folders of text files.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"folder {path} holds no {' or '.join(TEXT_SUFFIXES)} file: name the text files themselves.")
    return files


def _read(file: Path, field: str | None) -> list[str]:
    suffix = _suffix(file)
    if suffix in ROWS:
        return _texts(file, ROWS[suffix](file), field)
    text = _text(file)
    if "\0" in text:
        raise InputError(f"text {file} holds NUL characters, so it is no text: give {FORMATS} files.")
    return [text]


def _suffix(file: Path) -> str:
    """The suffix of what is compressed, where a file is."""
    return (file.with_suffix("") if file.suffix.lower() in OPENERS else file).suffix.lower()


def _text(file: Path) -> str:
    opener = OPENERS.get(file.suffix.lower())
    try:
        if opener is None:
            return file.read_text(encoding="utf-8-sig")
        with io.TextIOWrapper(opener(file), encoding="utf-8-sig") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        known = _suffix(file) in (*TEXT_SUFFIXES, *ROWS)
        remedy = "convert it to UTF-8" if known else f"convert it to UTF-8 if it is text, or give {FORMATS} files"
        raise InputError(f"text {file} is not UTF-8 (byte {error.start} is not): {remedy}.") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "strerror", None):
            raise InputError(f"text {file} cannot be read ({error.strerror}): check its permissions.") from error  # type: ignore[union-attr]
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"text {file} is no complete {file.suffix} file ({reason(error)}): copy or write it again.")


def _json_columns(file: Path) -> Columns:
    """A list of objects or strings, or one on each line."""
    text = _text(file)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        rows = [_json_line(file, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [row if isinstance(row, dict) else {TEXT_FIELD: row} for row in (rows if isinstance(rows, list) else [rows])]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _json_line(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"text {file} is no JSON (line {number}: {reason(error)}): repair it, or name the file .txt to read it as "
            "it is."
        ) from error


def _csv_columns(file: Path) -> Columns:
    """The first line names the columns; what separates them is the delimiter that it has most of."""
    text = _text(file)
    header = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=header.count), strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        names, *lines = [row for row in rows if row] or [[]]
    except csv.Error as error:
        raise InputError(f"text {file} is no CSV (line {rows.line_num}: {error}): repair its quotes.") from error
    finally:
        csv.field_size_limit(limit)
    return {name: [line[i] if i < len(line) else None for line in lines] for i, name in enumerate(names)}


def _parquet_columns(file: Path) -> Columns:
    """Columns of strings are read, of the others the names."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"text {file} needs the package pyarrow, which comes with datasets: pip install datasets, or use text."
        ) from error
    try:
        schema = parquet.read_schema(file)
        texts = [each.name for each in schema if str(each.type) in ("string", "large_string", "string_view")]
        table = parquet.read_table(file, columns=texts)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(file, error) from error
    return {name: table.column(name).to_pylist() if name in texts else [] for name in schema.names}


ROWS: dict[str, Callable[[Path], Columns]] = {
    ".json": _json_columns,
    ".jsonl": _json_columns,
    ".ndjson": _json_columns,
    ".csv": _csv_columns,
    ".tsv": _csv_columns,
    ".parquet": _parquet_columns,
}


def _texts(file: Path, columns: Columns, asked: str | None) -> list[str]:
    """The values of the field that holds the text; rows without it are left out, as they are of a dataset."""
    texts = [name for name, values in columns.items() if any(isinstance(value, str) for value in values)]
    field = text_field(asked, texts)
    if field is None:
        there = ", ".join(columns) or "none"
        raise InputError(
            f"text {file} has no field of strings named {asked or TEXT_FIELD!r} (it has {there}): name the one to read "
            "(--text-field, field=)."
        )
    values = [value for value in columns[field] if value is not None]
    other = next((value for value in values if not isinstance(value, str)), None)
    if other is not None:
        raise InputError(f"text {file} has a {type(other).__name__} in its field {field!r}: give strings alone.")
    return values
