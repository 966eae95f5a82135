"""Text becomes the token windows it should, and unusable text is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sys
from pathlib import Path

import datasets
import pytest
import torch
from texts import TEXT, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from slicegpt_fast import InputError, calibration, token_batches
from slicegpt_fast.calibration import (
    DATASETS,
    batched,
    dataset_documents,
    join_documents,
    text_documents,
    token_windows,
)


class TestFiles:
    def test_files_in_the_order_given_and_folders_sorted(self, tmp_path):
        for name in ("b.txt", "a.md", "sub/c.TXT", "ignored.json", "one.log"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
        documents = text_documents([tmp_path / "one.log", str(tmp_path)])
        assert documents == [f"text of {name}" for name in ("one.log", "a.md", "b.txt", "sub/c.TXT")]

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_text("at home")
        assert text_documents(["~/a.txt"]) == ["at home"]

    def test_missing(self, tmp_path):
        with pytest.raises(
            InputError, match=r"^text .*/no does not exist: give text files or folders of text files\.$"
        ):
            text_documents([tmp_path / "no"])

    def test_folder_without_text(self, tmp_path):
        (tmp_path / "a.json").write_text("{}")
        with pytest.raises(InputError, match=r"holds no \.txt or \.md file: name the text files themselves\.$"):
            text_documents([tmp_path])

    def test_not_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
        with pytest.raises(InputError, match=r"a\.txt is not UTF-8 \(byte 2 is not\): convert it to UTF-8\.$"):
            text_documents([tmp_path])

    def test_unreadable(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        (tmp_path / "a.txt").write_text("secret")
        monkeypatch.setattr("pathlib.Path.read_text", refuse)
        with pytest.raises(InputError, match=r"cannot be read \(Permission denied\): check its permissions\.$"):
            text_documents([tmp_path / "a.txt"])


ROWS = [{"text": "line one\nline é\u2028still", "id": 1}, {"text": 'second, "quoted"', "id": 2}]
TEXTS = [row["text"] for row in ROWS]


def as_csv(rows, delimiter=",") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
CONTENTS = {
    "a.jsonl": LINES,
    "a.ndjson": f"{LINES}\n\n",
    "A.JSONL": json.dumps(ROWS[0]) + "\r\n" + json.dumps(ROWS[1]) + "\r\n",
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1),
    "strings.json": json.dumps(TEXTS),
    "mark.jsonl": f"\ufeff{LINES}",
    "a.csv": as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "a.tsv": as_csv(ROWS, "\t"),
}


class TestRows:
    """Files of rows give a document per row."""

    @pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
    @pytest.mark.parametrize("name", CONTENTS)
    def test_every_form(self, tmp_path, name, suffix):
        compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
        file = tmp_path / (name + suffix)
        file.write_bytes(compress(CONTENTS[name].encode()))
        assert text_documents([file]) == TEXTS

    def test_parquet(self, tmp_path):
        datasets.Dataset.from_list([*ROWS, {"text": None, "id": 3}]).to_parquet(tmp_path / "a.parquet")
        assert text_documents([tmp_path / "a.parquet"]) == TEXTS

    def test_text_is_text_when_compressed(self, tmp_path):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo"))
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
        assert text_documents([tmp_path / "a.txt.gz"]) == text_documents([tmp_path / "a.txt"]) == ["one\ntwo"]

    @pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
    def test_fields(self, tmp_path, form):
        def write(rows):
            file = tmp_path / f"a.{form}"
            if form == "parquet":
                datasets.Dataset.from_list(rows).to_parquet(file)
            else:
                file.write_text(as_csv(rows) if form == "csv" else "\n".join(map(json.dumps, rows)))
            return [file]

        rows = [{"question": "why", "answer": "because"}, {"question": "how", "answer": "so"}]
        assert text_documents(write(rows), "answer") == ["because", "so"]
        message = r"has no field of strings named '{}' \(it has question, answer\): name the one to read \(--text-field"
        for field, named in ((None, "text"), ("reply", "reply")):
            with pytest.raises(InputError, match=message.format(named)):
                text_documents(write(rows), field)
        assert text_documents(write([{"body": "only"}])) == ["only"]

    def test_long_fields(self, tmp_path):
        (tmp_path / "a.csv").write_text(as_csv([{"text": "long " * 40_000}]))
        assert text_documents([tmp_path / "a.csv"]) == ["long " * 40_000]
        assert csv.field_size_limit() < 200_000  # whose setting is the process's

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl is no JSON \(line 2: Expecting ':' delimiter"),
            ("a.json", b"not JSON", r"a\.json is no JSON \(line 1: Expecting value"),
            ("a.json", b'{"text": "a\xff"}', r"a\.json is not UTF-8 \(byte 11 is not\): convert it to UTF-8\."),
            ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}', r"has a list in its field 'text': give strings alone\."),
            ("a.jsonl", b"", r"has no field of strings named 'text' \(it has none\)"),
            ("a.json", b'{"rows": [1]}', r"has no field of strings named 'text' \(it has rows\)"),
            ("a.csv", b"", r"has no field of strings named 'text' \(it has none\)"),
            ("a.csv", b'text\n"open', r"a\.csv is no CSV \(line 2: unexpected end of data\): repair its quotes\."),
            ("a.txt.gz", b"plain", r"a\.txt\.gz is no complete \.gz file \(Not a gzipped file"),
            (
                "a.txt.gz",
                gzip.compress(b"text" * 99, mtime=0)[:-12],
                r"is no complete \.gz file \(Compressed file ended before",
            ),
            ("a.txt.xz", b"plain", r"is no complete \.xz file \(Input format not supported"),
            ("a.txt.bz2", b"plain", r"is no complete \.bz2 file \(Invalid data stream\): copy or write it again\."),
            ("a.parquet", b"PAR1", r"is no complete \.parquet file \("),
            (
                "a.zip",
                b"PK\x03\x04\xff",
                r"is not UTF-8 \(byte 4 is not\): convert it .* or give text, \.json, \.jsonl",
            ),
            ("a.bin", b"a\0b", r"a\.bin holds NUL characters, so it is no text: give text, \.json, \.jsonl"),
        ],
    )
    def test_files_that_are_not_what_they_say(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            text_documents([tmp_path / name])

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        (tmp_path / "a.parquet").touch()
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(InputError, match=r"needs the package pyarrow, which comes with datasets"):
            text_documents([tmp_path / "a.parquet"])


class TestWindows:
    def test_protocol(self):
        """Extracts shuffled with Python's own generator, a blank line between, no special tokens, cut in order."""
        extracts = [f"{number} {TEXT}" for number in range(7)]
        shuffled = list(extracts)
        random.Random(0).shuffle(shuffled)
        text = join_documents(extracts, seed=0)
        assert text == "\n\n".join(shuffled) != join_documents(extracts) == "\n\n".join(extracts)

        tokenizer = word_tokenizer()
        windows = token_windows(tokenizer, text[:500], 8)
        ids = tokenizer.backend_tokenizer.encode(text[:500], add_special_tokens=False).ids
        assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id  # which the windows leave out
        assert windows.dtype == torch.long
        assert windows.shape == (len(ids) // 8, 8)
        assert windows.flatten().tolist() == ids[: len(ids) // 8 * 8]

    def test_exactly_enough(self):
        assert token_windows(word_tokenizer(), "the cat " * 6, 4, count=3).shape == (3, 4)

    @pytest.mark.parametrize("text", ["", "the cat " * 5])
    def test_too_short(self, text):
        found = len(text.split())
        message = (
            rf"^the text has {found} tokens, but 12 are needed \(3 windows of 4\): give more text, or ask for fewer or "
            r"shorter windows\.$"
        )
        with pytest.raises(InputError, match=message):
            token_windows(word_tokenizer(), text, 4, count=3)

    @pytest.mark.parametrize(("length", "count"), [(1, 3), (8, 0), (0, 1), (-8, 1)])
    def test_out_of_range(self, length, count):
        with pytest.raises(InputError, match=f"^{count} windows of {length} tokens are no text: ask for 1 of 2 tokens"):
            token_windows(word_tokenizer(), TEXT, length, count=count)

    @pytest.mark.parametrize(
        ("length", "sizes"), [(512, [4, 3]), (2048, [1] * 7), (4096, [1] * 7), (700, [2, 2, 2, 1])]
    )
    def test_batches_hold_about_2048_tokens(self, length, sizes):
        windows = torch.arange(7 * length).view(7, length)
        batches = batched(windows)
        assert [len(batch) for batch in batches] == sizes
        assert torch.equal(torch.cat(batches), windows)


TOKENIZERS = {
    "bytes, words": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainers.BpeTrainer),
    "bytes, a space before": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), trainers.BpeTrainer),
    "no words": (models.BPE(), None, trainers.BpeTrainer),
    "metaspace": (models.BPE(), pre_tokenizers.Metaspace(prepend_scheme="first", split=False), trainers.BpeTrainer),
    "unigram": (models.Unigram(), pre_tokenizers.Metaspace(), trainers.UnigramTrainer),
    "unigram, no words": (models.Unigram(), None, trainers.UnigramTrainer),
    "wordpiece": (models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer(), trainers.WordPieceTrainer),
}
CHAPTER = "\n\n".join(
    f"{n}. {TEXT[n:]}, naïve  Ψυχή\t日本語 \U0001f600{'!' * (n % 5)} {n * 7919 % 1009}" for n in range(60)
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    model, words, trainer = TOKENIZERS[request.param]
    tokenizer = Tokenizer(model)
    if words is not None:
        tokenizer.pre_tokenizer = words
    special = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    tokenizer.train_from_iterator(
        [CHAPTER], trainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, **special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class TestPieces:
    """A text that is tokenised in pieces has the tokens that it has as a whole."""

    @pytest.fixture
    def encoded(self, monkeypatch):
        """How long the pieces are that a tokenizer gets; they are short, and so are the runs in which they agree."""
        lengths = []
        located = calibration._located_tokens

        def spy(tokenizer, text, begin, size):
            lengths.append(size)
            return located(tokenizer, text, begin, size)

        monkeypatch.setattr(calibration, "_located_tokens", spy)
        for name, value in dict(PIECE=700, OVERLAP=64, AGREEING=8).items():
            monkeypatch.setattr(calibration, name, value)
        return lengths

    @pytest.mark.parametrize(
        "text",
        [
            CHAPTER,
            CHAPTER.replace(" ", ""),
            CHAPTER.replace("\n", " " * 40),
            "12345" * 900,
            " " * 3000 + CHAPTER,
            "ab" * 2000 + CHAPTER[:2000] + "=" * 3000,
            "\U0001f600" * 2000,
            "",
        ],
        ids=["prose", "no spaces", "many spaces", "digits", "spaces first", "runs", "bytes", "nothing"],
    )
    def test_the_same_tokens(self, tokenizer, encoded, text):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [token for piece in calibration._token_pieces(tokenizer, text) for token in piece] == whole
        assert len(encoded) > 1 or len(text) <= calibration.PIECE

    def test_the_same_tokens_wherever_the_cuts_fall(self, tokenizer, encoded, monkeypatch):
        whole = tokenizer(CHAPTER, add_special_tokens=False)["input_ids"]
        for size in range(600, 640):
            monkeypatch.setattr(calibration, "PIECE", size)
            assert [token for piece in calibration._token_pieces(tokenizer, CHAPTER) for token in piece] == whole

    def test_prose_is_never_tokenised_as_a_whole(self, encoded):
        token_windows(word_tokenizer(), f"{TEXT} " * 200, 8)
        assert max(encoded) == 700
        assert len(encoded) > 20

    def test_no_more_is_tokenised_than_is_wanted(self, encoded):
        windows = token_windows(word_tokenizer(), f"{TEXT} " * 200, 8, count=2, limit=3)
        assert torch.equal(windows, token_windows(word_tokenizer(), f"{TEXT} " * 2, 8)[:3])
        assert len(encoded) <= 4

    def test_a_piece_without_a_place_to_cut_grows(self, encoded):
        """One word, which the tokenizer does not know, is one token however long it is."""
        text = f"{TEXT} " * 30 + "x" * 10_000 + f" {TEXT}" * 30
        windows = token_windows(word_tokenizer(), text, 2)
        assert (
            windows.flatten().tolist()
            == word_tokenizer()(text, add_special_tokens=False)["input_ids"][: len(windows) * 2]
        )
        assert max(encoded) > 10_000

    def test_a_tokenizer_that_tells_no_characters(self, encoded, monkeypatch):
        monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
        assert token_windows(word_tokenizer(), f"{TEXT} " * 200, 8).shape == (200 * len(TEXT.split()) // 8, 8)
        assert encoded == []


class TestBatches:
    def test_what_the_command_line_makes(self):
        documents = [" ".join(TEXT.split()[number:]) for number in range(12)]
        windows = token_windows(word_tokenizer(), join_documents(documents, seed=0), 8)
        for each in (documents, tuple(documents), iter(documents)):
            batches = token_batches(word_tokenizer(), each, length=8, sequences=5)
            assert torch.equal(torch.cat(batches), windows[:5])
        everything = token_batches(word_tokenizer(), documents, length=8, sequences=None)
        assert torch.equal(torch.cat(everything), windows)
        ordered = token_batches(word_tokenizer(), documents, length=8, sequences=5, seed=None)
        assert torch.equal(torch.cat(ordered), token_windows(word_tokenizer(), join_documents(documents), 8)[:5])
        assert not torch.equal(torch.cat(ordered), windows[:5])

    def test_one_text(self):
        (batch,) = token_batches(word_tokenizer(), TEXT, length=8, sequences=2)
        assert torch.equal(batch, token_windows(word_tokenizer(), TEXT, 8)[:2])

    @pytest.mark.parametrize(("length", "wanted"), [(512, [4, 1]), (2048, [1] * 5)])
    def test_about_2048_tokens_each(self, length, wanted):
        batches = token_batches(word_tokenizer(), "cat " * 5 * length, length=length, sequences=5)
        assert [len(batch) for batch in batches] == wanted

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (7, r"^text must be a string or a list of strings, not int: "),
            (None, r"^text must be a string or a list of strings, not NoneType: "),
            (Path("corpus.txt"), r"^text must be a string or a list of strings, not PosixPath: "),
            (b"some bytes", r"^document 0 of text must be a string, not int: "),
            (["a", None], r"^document 1 of text must be a string, not NoneType: "),
            ([{"text": "a"}], r"^document 0 of text must be a string, not dict: "),
        ],
    )
    def test_what_is_no_text(self, text, message):
        with pytest.raises(InputError, match=message):
            token_batches(word_tokenizer(), text)

    @pytest.mark.parametrize("wrong", [dict(sequences=0), dict(sequences=-1), dict(length=1), dict(length=0)])
    def test_out_of_range(self, wrong):
        with pytest.raises(InputError, match=r"are no text: ask for 1 of 2 tokens at least"):
            token_batches(word_tokenizer(), TEXT, **wrong)


class TestDatasets:
    @pytest.fixture
    def calls(self, monkeypatch):
        """What `load_dataset` was asked for; one of its rows is null."""
        calls = []

        def load_dataset(path, **options):
            calls.append((path, options))
            return datasets.Dataset.from_dict(
                {"text": ["a", "", None, "b"], "sentence": ["c", "d", "e", "f"], "label": [0, 1, 2, 3]}
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    @pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
    @pytest.mark.parametrize("name", DATASETS)
    def test_presets(self, calls, name, purpose):
        source = DATASETS[name]
        documents = dataset_documents(name, purpose)
        assert documents == (["c", "d", "e", "f"] if name == "ptb" else ["a", "", "b"])
        split = {"calibration": source.calibration, "evaluation": source.evaluation}[purpose]
        assert calls == [(source.path, {"split": split, **source.options})]

    def test_presets_never_test_on_what_they_calibrate_on(self):
        assert all(source.calibration != source.evaluation for source in DATASETS.values())

    def test_any_other_dataset(self, calls):
        dataset_documents("owner/name", "evaluation")
        dataset_documents("owner/name:config", "calibration", "validation[:5]")
        assert calls == [
            ("owner/name", {"split": "test", "name": None}),
            ("owner/name", {"split": "validation[:5]", "name": "config"}),
        ]

    def test_a_dataset_on_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text('{"body": "first", "n": 1}\n{"body": "second", "n": 2}\n')
        assert dataset_documents(str(tmp_path / "data"), "calibration") == ["first", "second"]
        with pytest.raises(InputError, match=r"^dataset .*data cannot be loaded: .*test"):
            dataset_documents(str(tmp_path / "data"), "evaluation")

    def test_no_single_column_of_text(self, monkeypatch):
        rows = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
        message = (
            r"^dataset owner/qa has no column of text named 'text' \(it has question, answer\): write its text to a "
            r"file and use that\.$"
        )
        with pytest.raises(InputError, match=message):
            dataset_documents("owner/qa", "calibration")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                datasets.exceptions.DatasetNotFoundError("..."),
                r"^dataset no/such does not exist or is not public: give one of wikitext2, alpaca, c4, ptb, or another",
            ),
            (
                ConnectionError("Couldn't reach the Hub"),
                r"^dataset no/such cannot be downloaded and is not in the local cache: go online, or use text files\.$",
            ),
            (
                ValueError("Unknown split 'x'. Should be one of ['train'].\nmore"),
                r"^dataset no/such cannot be loaded: Unknown split 'x'. Should be one of \['train'\]\.$",
            ),
            (RuntimeError(), r"^dataset no/such cannot be loaded: RuntimeError\.$"),
        ],
    )
    def test_failures(self, monkeypatch, error, message):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(InputError, match=message):
            dataset_documents("no/such", "calibration")

    def test_package_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match=r"needs the package datasets: pip install datasets, or"):
            dataset_documents("wikitext2", "calibration")
