"""The native extension and the packages built around it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import ninja
import pytest
import torch

from slicegpt_fast import _C, triton_kernels
from slicegpt_fast.kernels import native

ROOT = Path(__file__).parent.parent
ISAS = _C.cpu_isa_names()

# Loads the extension from its file alone: no package around it, so no torch either.
LOAD_C = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
assert "torch" not in sys.modules
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=240, **options)


def output(*command: str | Path, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the variables that the build and the extension read, then `changes`."""
    own = {"CXX", "CUDACXX", "CUDA_HOME", "PYTHONPATH"}
    kept = {name: value for name, value in os.environ.items() if name not in own and "SLICEGPT_FAST" not in name}
    return kept | changes


class TestExtension:
    def test_build_info(self):
        info = native.build_info()
        assert re.match(r"(GCC|Clang|.*clang) \d+", info.compiler, re.IGNORECASE)
        assert info.revision
        assert bool(info.cuda_archs) == bool(info.cuda_compiler) == hasattr(_C, "cuda_probe")
        assert all(re.fullmatch(r"\d+[af]?", arch) for arch in info.cuda_archs)

    @pytest.mark.parametrize(
        ("operand", "error"),
        [(256, AttributeError), (torch.ones(2, 1, 4), TypeError), (torch.ones(()), TypeError), ("1", AttributeError)],
    )
    def test_operands_are_matrices_and_vectors(self, operand, error):
        square = torch.eye(4)
        with pytest.raises(error):
            _C.norm_linear(operand, square, None, None, None, None, square, 0, 1e-5, 4.0, 0, 0, 0, 1)

    def test_shares_no_library_with_torch_and_exports_no_cuda(self):
        assert not re.search(r"NEEDED.*(cuda|cudart|torch|c10|python)", output("readelf", "-dW", _C.__file__))
        assert not re.search(r" cu(da)?[A-Z]\w*", output("readelf", "--dyn-syms", "-W", _C.__file__))

    @pytest.mark.skipif(not native.build_info().cuda_compiler, reason="built without CUDA")
    def test_holds_code_for_the_reported_archs(self):
        compile_ahead = pytest.importorskip("compile_ahead")
        compiled = set(re.findall(r"sm_(\d+[af]?)\.cubin", compile_ahead.cuobjdump(_C.__file__, "--list-elf")))
        assert compiled == set(native.build_info().cuda_archs)

    def test_is_read_by_the_cuobjdump_beside_nvcc(self, tmp_path, monkeypatch):
        compile_ahead = pytest.importorskip("compile_ahead")
        for name in ("nvcc", "cuobjdump"):
            (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $@\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
        assert compile_ahead.cuobjdump("FILE", "-sass") == "cuobjdump -sass FILE\n"

    @pytest.mark.gpu
    @pytest.mark.skipif(not native.build_info().cuda_compiler, reason="built without CUDA")
    def test_probe_runs_code_for_this_gpu(self):
        out = torch.zeros(2, dtype=torch.int32, device="cuda")
        _C.cuda_probe(out, 96, torch.cuda.current_stream().cuda_stream)
        threads, arch = out.tolist()
        major, minor = torch.cuda.get_device_capability()
        assert threads == 96
        assert arch in {int(re.sub(r"\D", "", arch)) * 10 for arch in native.build_info().cuda_archs}
        assert arch <= 100 * major + 10 * minor

    @pytest.mark.gpu
    @pytest.mark.skipif(not native.build_info().cuda_compiler, reason="built without CUDA")
    def test_a_failed_launch_says_why(self):
        with pytest.raises(RuntimeError, match="invalid configuration argument"):
            _C.cuda_probe(None, 1 << 20, torch.cuda.current_stream().cuda_stream)


class TestCpuIsa:
    def test_features_are_those_that_linux_reports(self):
        reported = set(re.search(r"^(?:flags|Features)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
        known = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
        known |= {"bf16", "sve", "svebf16"}
        found = set(native.cpu_features())
        assert found == reported & known

    @pytest.mark.parametrize("cap", ["", *ISAS])
    def test_is_the_strongest_below_the_cap(self, cap):
        def chosen(cap):
            command = (sys.executable, "-c", LOAD_C + "print(_C.cpu_isa())", _C.__file__)
            return output(*command, env=environment(SLICEGPT_FAST_CPU_ISA=cap))

        assert ISAS[0] == "baseline"
        assert ISAS.index(chosen(cap)) == min(ISAS.index(cap or ISAS[-1]), ISAS.index(chosen("")))

    def test_unknown_cap(self):
        done = run(
            *(sys.executable, "-c", "from slicegpt_fast.kernels.native import cpu_isa; cpu_isa()"),
            env=environment(SLICEGPT_FAST_CPU_ISA="sse9"),
        )
        assert done.stderr.strip().splitlines()[-1] == (
            "slicegpt_fast.errors.InputError: SLICEGPT_FAST_CPU_ISA names no instruction set of this machine; "
            f"unset it or set it to one of {', '.join(ISAS)}."
        )


def test_triton_kernels_is_no_top_level_package(tmp_path):
    assert triton_kernels.__name__ == "slicegpt_fast.triton_kernels"
    find = "import importlib.util as u; spec = u.find_spec('triton_kernels'); print(spec.origin if spec else '')"
    assert output(sys.executable, "-c", find, cwd=tmp_path) != triton_kernels.__file__


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    output(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder for PATH that holds a C++ compiler and nothing else."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("c++", "as", "ld"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


class TestSetup:
    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"PATH": ""}, "no C++ compiler found; install g++ or clang++, or set CXX to a C++ compiler's path."),
            ({"CXX": "/no/c++"}, "CXX is '/no/c++', which cannot be run; set it to a C++ compiler's path."),
            ({"SLICEGPT_FAST_CUDA": "yes"}, "SLICEGPT_FAST_CUDA is 'yes'; set it to auto, 0 or 1."),
            (
                {"SLICEGPT_FAST_CUDA": "1"},
                "SLICEGPT_FAST_CUDA is 1, but no CUDA compiler was found; set CUDACXX to nvcc's path.",
            ),
            ({"CUDACXX": "/no/nvcc"}, "CUDACXX is '/no/nvcc', which cannot be run; set it to nvcc's path."),
            (
                {"CUDACXX": sys.executable, "SLICEGPT_FAST_CUDA_ARCHS": "80,90"},
                "SLICEGPT_FAST_CUDA_ARCHS contains '80,90'; write architectures like 80;90a.",
            ),
        ],
    )
    def test_says_what_is_wrong(self, variables, message, tools, tmp_path):
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        done = run(
            *(sys.executable, "setup.py", "-q", "build_ext"), cwd=tmp_path, env=environment(PATH=str(tools)) | variables
        )
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1] == f"error: slicegpt-fast: {message}"
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "build").exists()

    @pytest.mark.slow
    def test_compiles_only_what_changed(self, sdist, tmp_path):
        tree = shutil.copytree(sdist, tmp_path / "tree")
        build = (sys.executable, "setup.py", "-q", "build_ext")
        asked = dict(cwd=tree, env=environment(SLICEGPT_FAST_CUDA="0"))
        assert "cxx" in output(*build, **asked)
        assert "cxx" not in output(*build, **asked)

        (tree / "csrc/status.cpp").touch()
        assert re.findall(r"csrc/\w+\.cpp", output(*build, **asked)) == ["csrc/status.cpp"]

        # The end of a file's name chooses what it is compiled for.
        here = "#ifndef __AVX2__\n#error\n#endif\n" if "avx2" in ISAS else "#error\n"  # else it is left out
        (tree / "csrc/cpu/probe_avx2.cpp").write_text(here)
        (tree / "csrc/cpu/probe_plain.cpp").write_text("#ifdef __AVX2__\n#error\n#endif\n")
        assert "probe_plain" in output(*build, **asked)

        (tree / "csrc/status.cpp").write_text("#error on purpose\n")
        done = run(*build, **asked)
        assert "#error on purpose" in done.stdout
        assert done.stderr.strip().endswith("csrc/ did not compile; the compiler's message stands above.")

        (tree / "csrc/slicegpt_fast.h").touch()
        (graph,) = (tree / "build").glob("*/build.ninja")
        would = output(Path(ninja.BIN_DIR, "ninja"), "-n", "-f", graph.relative_to(tree), **asked)
        assert "csrc/cpu/isa.cpp" in would


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, True], ids=["without CUDA", "with CUDA"])
def test_wheel(cuda, sdist, tools, tmp_path):
    """A wheel built without torch, in an environment that holds nothing else."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if cuda and not nvcc:
        pytest.skip("needs a CUDA compiler")
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('the build must not need torch')")

    env = environment(PYTHONPATH=str(poison))
    if cuda:
        env |= {"CUDACXX": nvcc, "SLICEGPT_FAST_CUDA_ARCHS": "80"}
    else:
        env |= {"PATH": str(tools)}  # and SLICEGPT_FAST_CUDA unset, which is auto
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    tree = shutil.copytree(sdist, tmp_path / "tree")
    left = tree / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/slicegpt_fast/ghost.py"
    left.parent.mkdir(parents=True)
    left.touch()  # of an earlier build
    output(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tree, env=env)
    wheel = next(tmp_path.glob("slicegpt_fast-*.whl"))

    top_level = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert top_level == {"slicegpt_fast", wheel.name.partition("-cp")[0] + ".dist-info"}
    packaged = zipfile.ZipFile(wheel).namelist()
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "slicegpt_fast").rglob("*.py")}
    expected |= {f"slicegpt_fast/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    expected |= {f"slicegpt_fast/{name}" for name in ("_C.pyi", "py.typed", "kernels/tuned.json")}
    assert {name for name in packaged if ".dist-info/" not in name and "/_C.cpython-" not in name} == expected

    python = tmp_path / "env/bin/python"
    output(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    output(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    library = next((tmp_path / "env").rglob("slicegpt_fast/_C.*.so"))
    info = eval(output(python, "-c", LOAD_C + "print(_C.build_info())", library, env=environment()))
    assert info["cuda_archs"] == ("80" if cuda else "")
    assert bool(info["cuda_compiler"]) == cuda
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["revision"])  # an sdist knows its release, not its commit
    assert not re.search(r"NEEDED.*cuda", output("readelf", "-dW", library))
