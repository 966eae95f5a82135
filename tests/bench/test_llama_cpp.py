"""The comparison with llama.cpp: its arguments, its rows and its table. llama.cpp itself is never built here."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp import Contender, gguf_read_bytes, markdown, ours, parser, rows_of, take_turns
from models import tiny_model, tokens

from slicegpt_fast import save_model, slice_model
from slicegpt_fast.evaluation import read_bytes


def contenders(order: list[str]) -> list[Contender]:
    def contender(engine: str, weights: str, size: int, seconds: float) -> Contender:
        def decode() -> float:
            order.append(f"{engine} {weights}")
            return seconds

        return Contender(engine, weights, size, decode)

    return [
        contender("slicegpt-fast", "bf16", 200_000_000, 0.008),
        contender("llama.cpp", "bf16", 200_000_000, 0.01),
        contender("llama.cpp", "q4_0", 50_000_000, 0.005),
    ]


def test_arguments():
    options = parser().parse_args(["even", "--new-tokens", "8"])
    assert (options.sliced, options.prompt, options.new_tokens, options.rounds) == (Path("even"), 512, 8, 5)
    with pytest.raises(SystemExit):
        parser().parse_args([])


def test_ours_times_the_new_tokens_after_the_first(tmp_path, monkeypatch):
    sliced = slice_model(tiny_model("llama"), [tokens(4, 32)], sparsity=0.25, basis="shared", progress=False)
    save_model(sliced, tmp_path / "sliced")
    ticks = iter(range(100))
    monkeypatch.setattr("slicegpt_fast.benchmark.now", lambda device: next(ticks))
    contender = ours(tmp_path / "sliced", "f32", prompt=5, new_tokens=3)
    assert (contender.engine, contender.weights) == ("slicegpt-fast", "f32")
    assert contender.read_bytes == read_bytes(sliced)
    begin = next(ticks)
    assert contender.decode() == 1  # a tick of the clock for each token
    assert next(ticks) - begin == 1 + (1 + 1 + 3)  # the prompt, the token made of it, those that are timed


@pytest.mark.parametrize(("weights", "share"), [("8 bits", 0.6), ("4 bits", 0.4)])
def test_ours_in_fewer_bits_reads_fewer_bytes(weights, share, tmp_path):
    save_model(tiny_model("llama"), tmp_path / "dense")
    sixteen, fewer = (ours(tmp_path / "dense", each, prompt=5, new_tokens=3) for each in ("bf16", weights))
    assert fewer.read_bytes < share * sixteen.read_bytes


def test_turns_go_there_and_back(monkeypatch):
    rates = iter([(1.0, 0.0), (40e9, 0.0), (50e9, 0.0), (60e9, 0.0)])
    monkeypatch.setattr("llama_cpp.machine_rates", lambda *_: next(rates))
    order: list[str] = []
    seconds, bandwidth = take_turns(contenders(order), rounds=3)
    there = ["slicegpt-fast bf16", "llama.cpp bf16", "llama.cpp q4_0"]
    assert order == 2 * (there + there[::-1])
    assert seconds == [[0.008] * 3, [0.01] * 3, [0.005] * 3]
    assert bandwidth == 50e9  # the round that warms up does not count


def test_table():
    rows = rows_of(contenders([]), [[0.1, 0.008, 0.007], [0.01], [0.005]], 50e9)
    settings = {"batch": 1, "prompt": 512, "new_tokens": 64, "rounds": 3}
    machine = {"processor": "A CPU (avx2)", "threads": "2", "date": "2026-01-01"}
    results = {"rows": rows, "read_bandwidth": 50e9, "settings": settings, "machine": machine}
    text = markdown(results | {"llama_cpp_python": "0.3"})
    assert "| engine | weights | tokens/s | x llama.cpp bf16 | MB read per token | of read floor |" in text
    assert "| slicegpt-fast | bf16 | 125.0 | 1.25 | 200.0 | 50% |" in text
    assert "| llama.cpp | q4_0 | 200.0 | 2.00 | 50.0 | 20% |" in text
    assert "A CPU (avx2), 2 threads, 2026-01-01; 64 tokens behind 512, medians of 3 rounds" in text


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_gguf_file(tied, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    names = ["token_embd.weight", "blk.0.ffn_up.weight"] + ["output.weight"] * (not tied)
    for name in names:
        writer.add_tensor(name, np.zeros((8, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_read_bytes(tmp_path / "model.gguf") == 2 * 8 * 32 * 4
