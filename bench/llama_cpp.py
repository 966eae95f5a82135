"""Decode speed of a patched model beside llama.cpp on the plain export of the same model, on this CPU.

    python bench/llama_cpp.py SLICED [--prompt 512] [--new-tokens 64] [--rounds 5] [--out build/bench]

SLICED is the folder of a sliced model that can be exported plain (docs/export.md). llama.cpp is built, natively, from
the source distribution of llama-cpp-python, once, in the user's cache: this needs the Python index and a C++ compiler,
and some 10 minutes of a core. Its own tools make the GGUF files. Ours is `model.generate`, greedy, timed from the first
new token to the last; theirs is llama-bench at the same depth, which samples nothing. One sequence and the same number
of threads for both (OMP_NUM_THREADS chooses it); all take turns, and the memory's bandwidth is measured in each round.
Prints a table; writes llama-cpp.json.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import GGUFReader
from markdown_table import table
from pytest_benchmark.utils import get_commit_info
from tqdm import tqdm

from slicegpt_fast import InputError, export_plain, load_model, load_tokenizer, patch_model, quantize_model
from slicegpt_fast.benchmark import Generate, machine, machine_rates
from slicegpt_fast.evaluation import read_bytes
from slicegpt_fast.quantization.plan import Bits
from slicegpt_fast.quickstart import MODEL, cached

CPU = torch.device("cpu")
VERSION = "0.3.36"  # of llama-cpp-python
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PACKAGES = ("cmake", "ninja", "sentencepiece")  # what the build and the converter want
PROGRAMS = ("llama-bench", "llama-quantize")
# Where the processor has AMX, llama.cpp's code for it ended a prompt on quantised weights with a segmentation fault.
# The rest of AVX-512 stays.
WITHOUT_AMX = "-U__AMX_INT8__"
LEFT_OUT = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP", "LLAMA_OPENSSL")
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}  # of ours, and of the GGUF files that the converter writes
QUANTIZED = ("q8_0", "q4_0")
ROUNDED: dict[str, Bits] = {"8 bits": 8, "4 bits": 4}  # of ours, in groups of 32, with activations in bf16
BASELINE = ("llama.cpp", "bf16")


@dataclass(frozen=True)
class Contender:
    """Who decodes, with which weights.

    Attributes:
        engine: ours or theirs.
        weights: how they are stored.
        read_bytes: of the matrices that a token is multiplied with.
        decode: decodes one sequence behind a prompt; returns the seconds of a token.
    """

    engine: str
    weights: str
    read_bytes: int
    decode: Callable[[], float]


def run(*command: str | Path, **options: Any) -> None:
    """Run a command that says on stderr what it does."""
    subprocess.run(command, stdout=sys.stderr, check=True, **options)


def pip(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def sources() -> Path:
    """The folder of llama.cpp's sources, downloaded the first time."""
    folder = cached(MODEL).with_name(f"llama.cpp-{VERSION}")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            only = ("--no-deps", "--no-binary=llama-cpp-python")
            pip("download", *only, "--dest", partial, f"llama-cpp-python=={VERSION}")
            (archive,) = Path(partial).glob("*.tar.gz")
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            if digest != SHA256:
                raise InputError(f"{archive.name} has sha256 {digest}, not {SHA256}: try another connection.")
            with tarfile.open(archive) as members:
                members.extractall(partial, filter="data")
            (unpacked,) = Path(partial).glob("*/vendor/llama.cpp")
            unpacked.rename(folder)
    return folder


def with_packages(source: Path) -> dict[str, str]:
    """The environment in which PACKAGES are found, installed beside the sources the first time."""
    folder = source / f"packages-{sys.implementation.cache_tag}"
    if not folder.exists():
        pip("install", "--quiet", "--no-deps", "--target", folder, *PACKAGES)
    return os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}


def programs(source: Path, environment: dict[str, str]) -> Path:
    """The folder of llama.cpp's programs, compiled for this processor the first time."""
    processor = re.sub(r"[^a-z0-9]+", "-", machine(CPU)["processor"].lower()).strip("-")
    build = source / f"build-{processor}"
    if not all((build / "bin" / name).exists() for name in PROGRAMS):
        options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in LEFT_OUT)]
        options += [f"-DCMAKE_{language}_FLAGS={WITHOUT_AMX}" for language in ("C", "CXX")]
        run("cmake", "-S", source, "-B", build, "-G", "Ninja", *options, env=environment)
        run("cmake", "--build", build, "--target", *PROGRAMS, env=environment)
    return build / "bin"


def gguf_files(plain: Path, source: Path, built: Path, environment: dict[str, str]) -> dict[str, Path]:
    """A plain export as GGUF files beside it, by how their weights are stored."""
    files = {weights: plain.with_name(f"{weights}.gguf") for weights in (*DTYPES, *QUANTIZED)}
    for weights in DTYPES:
        converter = (sys.executable, source / "convert_hf_to_gguf.py")
        run(*converter, plain, "--outfile", files[weights], "--outtype", weights, env=environment)
    for weights in QUANTIZED:
        run(built / "llama-quantize", files["f32"], files[weights], weights)
    return files


def gguf_read_bytes(file: Path) -> int:
    """As :func:`slicegpt_fast.evaluation.read_bytes`, of a GGUF file: a tied table is the head."""
    matrices = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    if "output.weight" in matrices:
        del matrices["token_embd.weight"]
    return sum(matrices.values())


def ours(sliced: Path, weights: str, prompt: int, new_tokens: int) -> Contender:
    model: Any = load_model(sliced, dtype=DTYPES.get(weights, torch.bfloat16))
    if weights in ROUNDED:
        model = quantize_model(model, ROUNDED[weights], progress=False)
    patch_model(model, strict=True)
    torch.manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, prompt))
    turn = Generate(model)

    def decode() -> float:
        _, seconds = turn(tokens, new_tokens)
        return seconds / new_tokens

    return Contender("slicegpt-fast", weights, read_bytes(model), decode)


def theirs(built: Path, weights: str, file: Path, prompt: int, new_tokens: int) -> Contender:
    sizes = {"-m": file, "-t": torch.get_num_threads(), "-p": 0, "-n": new_tokens, "-d": prompt, "-r": 1, "-o": "json"}
    command = [built / "llama-bench", *(str(each) for pair in sizes.items() for each in pair)]

    def decode() -> float:
        (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return 1e-9 * found["avg_ns"] / new_tokens

    return Contender("llama.cpp", weights, gguf_read_bytes(file), decode)


def take_turns(contenders: Sequence[Contender], rounds: int) -> tuple[list[list[float]], float]:
    """The seconds of a token of each contender by round, after one to warm up, and the median read bandwidth."""
    seconds: list[list[float]] = [[] for _ in contenders]
    bandwidths = []
    for turn in tqdm(range(rounds + 1), desc="decode", unit="round"):
        bandwidths.append(machine_rates(CPU, torch.float32)[0])
        for number in range(len(contenders))[:: 1 - 2 * (turn % 2)]:  # nobody always follows the same one
            seconds[number].append(contenders[number].decode())
    return [each[1:] for each in seconds], median(bandwidths[1:])


def rows_of(contenders: Sequence[Contender], seconds: Sequence[list[float]], bandwidth: float) -> list[dict[str, Any]]:
    """What is written of each contender: its median, compared with the baseline's and with reading alone."""
    medians = {(each.engine, each.weights): median(taken) for each, taken in zip(contenders, seconds, strict=True)}
    return [
        {
            "engine": each.engine,
            "weights": each.weights,
            "tokens/s": 1 / medians[each.engine, each.weights],
            "times as fast": medians[BASELINE] / medians[each.engine, each.weights],
            "read_bytes": each.read_bytes,
            "read_share": each.read_bytes / bandwidth / medians[each.engine, each.weights],
            "seconds": taken,
        }
        for each, taken in zip(contenders, seconds, strict=True)
    ]


def markdown(results: dict[str, Any]) -> str:
    """The table, with a line on what it was measured."""
    lines = [
        {
            "engine": row["engine"],
            "weights": row["weights"],
            "tokens/s": f"{row['tokens/s']:.1f}",
            f"x {' '.join(BASELINE)}": f"{row['times as fast']:.2f}",
            "MB read per token": f"{row['read_bytes'] / 1e6:.1f}",
            "of read floor": f"{row['read_share']:.0%}",
        }
        for row in results["rows"]
    ]
    machine, settings = results["machine"], results["settings"]
    return (
        f"{table(lines)}\n\n{machine['processor']}, {machine['threads']} threads, {machine['date']}; "
        f"{settings['new_tokens']} tokens behind {settings['prompt']}, medians of {settings['rounds']} rounds; "
        f"memory read at {results['read_bandwidth'] / 1e9:.1f} GB/s; llama-cpp-python {results['llama_cpp_python']}."
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sliced", type=Path, help="folder of a sliced model that can be exported plain")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before those that are timed (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that are timed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of the JSON (%(default)s)")
    return parser


def main() -> None:
    options = parser().parse_args()
    sizes = (options.prompt, options.new_tokens)
    with TemporaryDirectory() as folder:
        plain = Path(folder, "plain")
        export_plain(load_model(options.sliced), plain, load_tokenizer(options.sliced))
        source = sources()
        environment = with_packages(source)
        built = programs(source, environment)
        files = gguf_files(plain, source, built, environment)
        contenders = [ours(options.sliced, weights, *sizes) for weights in (*DTYPES, *ROUNDED)]
        contenders += [theirs(built, weights, file, *sizes) for weights, file in files.items()]
        seconds, bandwidth = take_turns(contenders, options.rounds)
    commit = get_commit_info()
    results = {
        "rows": rows_of(contenders, seconds, bandwidth),
        "read_bandwidth": bandwidth,
        "settings": {"batch": 1, "prompt": options.prompt, "new_tokens": options.new_tokens, "rounds": options.rounds},
        "llama_cpp_python": VERSION,
        "machine": machine(CPU),
        "commit": {name: commit[name] for name in ("id", "dirty")},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "llama-cpp.json").write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
