"""Where each Hugging Face family keeps the parts that touch the residual stream: one row per family.

A decoder layer is a sequence of sublayers. Each reads the residual stream at one place, its *norm site*, through one or
more branches and adds their outputs: ``h <- h + module(norm(h)) [+ module'(norm'(h))]``. A branch's *readers* are the
weights whose input is the normalised stream, its *writers* those whose output is added to the stream. Slicing narrows
the inputs of readers and the outputs of writers; heads, rotary embeddings, query norms and caches are left alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slicegpt_fast.errors import InputError


@dataclass(frozen=True)
class Branch:
    """One module beside the residual path. Strings are paths inside the decoder layer.

    Attributes:
        norm: the norm it reads through; branches of one sublayer may share it.
        modules: what is applied to the normalised stream, in order.
        readers, writers: linear modules, or parameters of shape [experts, out, in]. Paths that a layer lacks are left
            out (mixture-of-experts families have layers of both kinds).
        takes_layer_arguments: the first module is called with the layer's arguments (masks, positions, cache).
        keyword: by which the family gives the first module the normalised stream; None where it does so by position.
        withheld: the layer's arguments that the first module is not called with.
        activation: the module between a feed-forward network's readers and writers; None for attention.
    """

    norm: str
    modules: tuple[str, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    takes_layer_arguments: bool = False
    keyword: str | None = None
    withheld: tuple[str, ...] = ()
    activation: str | None = None


@dataclass(frozen=True)
class Sublayer:
    """The branches that read the stream at one norm site.

    The site's shortcut is a module of the layer named after ``name``, which must not look like a name that transformers
    rewrites on saving (Mixtral's ``mlp``).
    """

    name: str
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Architecture:
    """One family. Strings are submodule paths inside the causal language model.

    Attributes:
        sublayers: of every decoder layer, in order.
        embeddings: the tables whose rows are summed into the stream.
        centered: its norms are LayerNorms, which subtract the mean that slicing folds into every writer of the stream.
        positional: the arguments that a decoder layer is given by position, after the stream.
        returns_tuple: a decoder layer returns ``(stream, attention weights)`` instead of the stream.
        keeps_width: its code holds the stream to one width, so all sites, the head's included, must keep equal sizes.
    """

    sublayers: tuple[Sublayer, ...]
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    centered: bool = False
    positional: tuple[str, ...] = ()
    returns_tuple: bool = False
    keeps_width: bool = False

    def sites(self, model: nn.Module) -> Iterator[tuple[int, nn.Module, Sublayer]]:
        """Yield ``(layer index, layer, sublayer)`` for every norm site of the decoder layers, in the stream's order."""
        for index, layer in enumerate(at(model, self.layers).children()):
            for sublayer in self.sublayers:
                yield index, layer, sublayer


@dataclass
class Weight:
    """A weight ``owner.<name>`` as a matrix [..., out, in] (Conv1D holds its transpose), and its bias [out] or None.

    Assigning keeps the parameter's dtype and whether it is trained.
    """

    owner: nn.Module
    name: str = "weight"

    @property
    def matrix(self) -> Tensor:
        return self._oriented(cast(Tensor, getattr(self.owner, self.name)))

    @matrix.setter
    def matrix(self, value: Tensor) -> None:
        old = getattr(self.owner, self.name)
        setattr(self.owner, self.name, _parameter(self._oriented(value), old))

    @property
    def bias(self) -> Tensor | None:
        return cast(Tensor | None, getattr(self.owner, "bias", None)) if self.name == "weight" else None

    @bias.setter
    def bias(self, value: Tensor) -> None:
        self.owner.bias = _parameter(value, self.matrix)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter behind ``matrix``."""
        return cast(nn.Parameter, getattr(self.owner, self.name))

    def view_of(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Let the parameters live in memory that already holds their values: [..., out, in] and [out]."""
        self.parameter.data = self._oriented(matrix)
        if self.bias is not None and bias is not None:
            self.bias.data = bias

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.mT if isinstance(self.owner, Conv1D) else matrix


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)


def at(module: nn.Module, path: str) -> Any:
    """The submodule at a path of the table; typed Any, since the path decides what it is."""
    return module.get_submodule(path)


def weights(layer: nn.Module, paths: tuple[str, ...]) -> list[Weight]:
    """The weights at those of ``paths`` that ``layer`` has."""
    found = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        try:
            owner = at(layer, parent)
        except AttributeError:
            continue
        value = getattr(owner, name, None)
        if isinstance(value, nn.Parameter):
            found.append(Weight(owner, name))
        elif value is not None:
            found.append(Weight(value))
    return found


def attention(
    norm: str,
    module: str,
    readers: tuple[str, ...],
    writer: str,
    *after: str,
    keyword: str | None = "hidden_states",
    withheld: tuple[str, ...] = (),
) -> Branch:
    """An attention branch; ``readers`` and ``writer`` are names inside ``module``."""
    inside = tuple(f"{module}.{reader}" for reader in readers)
    writers = (f"{module}.{writer}",)
    return Branch(norm, (module, *after), inside, writers, True, keyword, withheld)


def mlp(
    norm: str, module: str, readers: tuple[str, ...], writers: tuple[str, ...], activation: str, *after: str
) -> Branch:
    """An MLP branch; ``readers``, ``writers`` and ``activation`` are names inside ``module``."""
    inside, outside = (tuple(f"{module}.{name}" for name in names) for names in (readers, writers))
    return Branch(norm, (module, *after), inside, outside, activation=f"{module}.{activation}")


def sequential(attending: Branch, feeding: Branch) -> tuple[Sublayer, ...]:
    """Attention, then the MLP: two norm sites per layer."""
    return (Sublayer("attention", (attending,)), Sublayer("feedforward", (feeding,)))


def parallel(attending: Branch, feeding: Branch) -> tuple[Sublayer, ...]:
    """Attention beside the MLP: one norm site per layer."""
    return (Sublayer("block", (attending, feeding)),)


QKV = ("q_proj", "k_proj", "v_proj")
SELF_ATTENTION = attention("input_layernorm", "self_attn", QKV, "o_proj")
GATED_MLP = mlp("post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), ("down_proj",), "act_fn")
GATED_EXPERTS = mlp(
    "post_attention_layernorm",
    "mlp",
    ("gate_proj", "up_proj", "gate", "experts.gate_up_proj"),  # dense layers have the first two, sparse ones the rest
    ("down_proj", "experts.down_proj"),
    "act_fn",
)

LLAMA = Architecture(sequential(SELF_ATTENTION, GATED_MLP))
MIXTURE_OF_EXPERTS = Architecture(sequential(SELF_ATTENTION, GATED_EXPERTS), keeps_width=True)
PHI3 = Architecture(
    sequential(
        attention("input_layernorm", "self_attn", ("qkv_proj",), "o_proj", "resid_attn_dropout"),
        mlp("post_attention_layernorm", "mlp", ("gate_up_proj",), ("down_proj",), "activation_fn", "resid_mlp_dropout"),
    )
)
PHI = Architecture(
    parallel(
        attention("input_layernorm", "self_attn", QKV, "dense", "resid_dropout"),
        mlp("input_layernorm", "mlp", ("fc1",), ("fc2",), "activation_fn", "resid_dropout"),
    ),
    final_norm="model.final_layernorm",
    centered=True,
)
CROSS_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask")
GPT2 = Architecture(
    sequential(
        attention("ln_1", "attn", ("c_attn",), "c_proj", keyword=None, withheld=CROSS_ATTENTION),
        mlp("ln_2", "mlp", ("c_fc",), ("c_proj",), "act"),
    ),
    embeddings=("transformer.wte", "transformer.wpe"),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    centered=True,
    positional=("past_key_values", "attention_mask", "encoder_hidden_states"),
    keeps_width=True,
)


def opt(config: PreTrainedConfig) -> Architecture:
    """OPT, except the one size (350m) whose norms stand behind the residual additions."""
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise InputError(
            "this OPT normalises after its residual additions (opt-350m does), so its stream is not free to rotate: "
            "use another size."
        )
    return Architecture(
        sequential(
            attention("self_attn_layer_norm", "self_attn", QKV, "out_proj", withheld=("use_cache",)),
            Branch("final_layer_norm", ("fc1", "activation_fn", "fc2"), ("fc1",), ("fc2",), activation="activation_fn"),
        ),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        centered=True,
    )


def gpt_neox(config: PreTrainedConfig) -> Architecture:
    """GPT-NeoX and Pythia: two norms, which read the stream at one site where the residual is parallel."""
    form = parallel if config.use_parallel_residual else sequential
    return Architecture(
        form(
            attention(
                "input_layernorm", "attention", ("query_key_value",), "dense", "post_attention_dropout", keyword=None
            ),
            mlp("post_attention_layernorm", "mlp", ("dense_h_to_4h",), ("dense_4h_to_h",), "act", "post_mlp_dropout"),
        ),
        embeddings=("gpt_neox.embed_in",),
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        centered=True,
    )


def stablelm(config: PreTrainedConfig) -> Architecture:
    """StableLM: Llama's layer with LayerNorms; the parallel form shares one norm."""
    shared = config.use_parallel_residual
    feeding = replace(GATED_MLP, norm="input_layernorm" if shared else GATED_MLP.norm, modules=("mlp", "dropout"))
    return Architecture((parallel if shared else sequential)(SELF_ATTENTION, feeding), centered=True)


def falcon(config: PreTrainedConfig) -> Architecture:
    """Falcon: sequential (rw), parallel with one norm (7b, 11b) or with two (40b, 180b)."""
    two_norms = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    in_parallel = config.parallel_attn or config.new_decoder_architecture
    norms = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "input_layernorm")
    if not in_parallel:
        norms = ("input_layernorm", "post_attention_layernorm")
    return Architecture(
        (parallel if in_parallel else sequential)(
            attention(norms[0], "self_attention", ("query_key_value",), "dense", keyword=None),
            mlp(norms[1], "mlp", ("dense_h_to_4h",), ("dense_4h_to_h",), "act"),
        ),
        embeddings=("transformer.word_embeddings",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        centered=True,
        returns_tuple=True,
    )


ARCHITECTURES: dict[str, Architecture | Callable[[Any], Architecture]] = {
    "falcon": falcon,
    "gpt2": GPT2,
    "gpt_neox": gpt_neox,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTURE_OF_EXPERTS,
    "opt": opt,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": MIXTURE_OF_EXPERTS,
    "stablelm": stablelm,
}

OUTPUT_NORMS = "a weighted norm stands between each output projection and the stream, and no rotation passes through it"
REFUSED = {
    "gemma2": OUTPUT_NORMS,
    "gemma3": OUTPUT_NORMS,
    "gemma3_text": OUTPUT_NORMS,
    "olmo2": OUTPUT_NORMS,
    "olmo3": OUTPUT_NORMS,
}


def architecture_of(model: Any) -> Architecture:
    """Return the table row for a causal language model or its config.

    Raises:
        InputError: not a transformers model, an encoder model, an unknown family, one to which the method does not
            apply, or a model without its language head.
    """
    if not isinstance(model, PreTrainedModel | PreTrainedConfig):
        raise InputError(f"model must be a transformers causal language model, not {type(model).__name__}.")
    config = model if isinstance(model, PreTrainedConfig) else model.config
    if config.model_type in REFUSED:
        raise InputError(f"model type {config.model_type!r} cannot be sliced: {REFUSED[config.model_type]}.")
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise InputError(
            f"model type {config.model_type!r} is not supported: slicegpt-fast slices the decoder-only families "
            f"{', '.join(ARCHITECTURES)}."
        )
    if row is not LLAMA and Version(transformers.__version__) < Version("5.17"):
        raise InputError(
            f"model type {config.model_type!r} needs transformers 5.17 or newer, this is {transformers.__version__}: "
            "upgrade it."
        )
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        raise InputError(
            f"{type(model).__name__} has no language head: load the model with AutoModelForCausalLM.from_pretrained."
        )
    return row if isinstance(row, Architecture) else row(config)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, each module's own mode after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
