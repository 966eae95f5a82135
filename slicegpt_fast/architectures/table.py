"""Where each Hugging Face family keeps the parts that touch the residual stream: one row per family.

A decoder layer is a sequence of sublayers. Each reads the residual stream at one point, its *norm site*, through one or
more branches and adds their outputs: ``h <- h + module(norm(h)) [+ module'(norm'(h))]``. A branch's *readers* are the
weights whose input is the normalised stream, its *writers* those whose output is added to the stream. Slicing narrows
the inputs of readers and the outputs of writers; heads, rotary embeddings, query norms and caches are left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

from slicegpt_fast.errors import InputError

Output = Literal["query", "key", "value", "gate", "up", "router"]


@dataclass(frozen=True)
class Reader:
    """A linear module, or a parameter of shape [experts, out, in], that reads the normalised stream.

    Attributes:
        path: inside the decoder layer.
        outputs: what its rows compute, in order: an attention's queries, keys and values, the halves ``gate`` and
            ``up`` of a gated feed-forward network (``up`` alone where it has no gate), or an expert's ``router`` score.
        grouped: the rows are those of one key and value head after another, each behind the queries that attend to it;
            otherwise all rows of an output lie together.
    """

    path: str
    outputs: tuple[Output, ...]
    grouped: bool = False

    def channels(self, output: Output, rows: int) -> range:
        """Return which of ``rows`` rows compute ``output`` of a feed-forward network, channel by channel."""
        size, start = rows // len(self.outputs), self.outputs.index(output)
        return range(start * size, (start + 1) * size)


@dataclass(frozen=True)
class Heads:
    """The heads of an attention; neighbouring query heads share a key and value head.

    Attributes:
        queries: the number of query heads.
        values: the number of key and value heads.
        size: of one head.
    """

    queries: int
    values: int
    size: int

    def rows(self, reader: Reader, output: Output) -> list[range]:
        """Return the rows of ``reader`` that compute each head of ``output``."""
        groups = self.values if reader.grouped else 1
        per_group = {each: (self.queries if each == "query" else self.values) // groups for each in reader.outputs}
        before = sum(per_group[each] for each in reader.outputs[: reader.outputs.index(output)])
        first = [group * sum(per_group.values()) + before for group in range(groups)]
        heads = [start + head for start in first for head in range(per_group[output])]
        return [range(head * self.size, (head + 1) * self.size) for head in heads]

    def columns(self, value: int) -> range:
        """Return the columns of the output projection that read what a key and value head gave."""
        size = self.queries // self.values * self.size
        return range(value * size, (value + 1) * size)


@dataclass(frozen=True)
class Branch:
    """One module beside the residual path. Strings are paths inside the decoder layer.

    Paths that a layer lacks are left out: some mixture-of-experts families have dense layers too.

    Attributes:
        norm: the norm it reads through; branches of one sublayer may share it.
        modules: what is applied to the normalised stream, in order.
        inputs: its readers, and what their rows compute.
        writers: linear modules, or parameters of shape [experts, out, in]. The inputs of an attention's are the query
            heads in order, those of a feed-forward network its channels.
        takes_layer_arguments: the first module is called with the layer's arguments (masks, positions, cache).
        keyword: by which the family gives the first module the normalised stream; None where it does so by position.
        withheld: the layer's arguments that the first module is not called with.
        activation: the module between a feed-forward network's readers and writers; None for attention.
    """

    norm: str
    modules: tuple[str, ...]
    inputs: tuple[Reader, ...]
    writers: tuple[str, ...]
    takes_layer_arguments: bool = False
    keyword: str | None = None
    withheld: tuple[str, ...] = ()
    activation: str | None = None

    @property
    def readers(self) -> tuple[str, ...]:
        """The paths of its readers."""
        return tuple(reader.path for reader in self.inputs)


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
        value_heads: the number of key and value heads where the config's ``num_key_value_heads`` does not say it.
        channels: what the config calls the number of channels of a feed-forward network.
        expert_channels: what it calls that of an expert, where it has another name for it.
        cache: by which argument a decoder layer is given the cache.
        attends: its attention is the op ``attend``, with rotary angles that the model hands each layer, or with none.
        since: the first release of transformers whose code is the one described here.
    """

    sublayers: tuple[Sublayer, ...]
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    centered: bool = False
    positional: tuple[str, ...] = ()
    returns_tuple: bool = False
    keeps_width: bool = False
    value_heads: int | None = None
    channels: str = "intermediate_size"
    expert_channels: str | None = None
    cache: str = "past_key_values"
    attends: bool = True
    since: str = "5.17"

    def heads(self, config: PreTrainedConfig) -> Heads:
        """Return the attention's heads in a model of this config."""
        queries = config.num_attention_heads
        values = self.value_heads or getattr(config, "num_key_value_heads", None) or queries
        return Heads(queries, values, getattr(config, "head_dim", None) or config.hidden_size // queries)


def attention(
    norm: str,
    module: str,
    readers: tuple[Reader, ...],
    writer: str,
    *after: str,
    keyword: str | None = "hidden_states",
    withheld: tuple[str, ...] = (),
) -> Branch:
    """An attention branch; ``readers`` and ``writer`` are paths inside ``module``."""
    inside, outside = _inside(module, readers), (f"{module}.{writer}",)
    return Branch(norm, (module, *after), inside, outside, True, keyword, withheld)


def mlp(
    norm: str, module: str, readers: tuple[Reader, ...], writers: tuple[str, ...], activation: str, *after: str
) -> Branch:
    """An MLP branch; ``readers``, ``writers`` and ``activation`` are paths inside ``module``."""
    outside = tuple(f"{module}.{writer}" for writer in writers)
    return Branch(norm, (module, *after), _inside(module, readers), outside, activation=f"{module}.{activation}")


def _inside(module: str, readers: tuple[Reader, ...]) -> tuple[Reader, ...]:
    return tuple(replace(reader, path=f"{module}.{reader.path}") for reader in readers)


def fused_qkv(path: str, *, grouped: bool = False) -> tuple[Reader, ...]:
    """Queries, keys and values in one weight."""
    return (Reader(path, ("query", "key", "value"), grouped),)


def ungated(path: str) -> tuple[Reader, ...]:
    """The reader of a feed-forward network without a gate."""
    return (Reader(path, ("up",)),)


def sequential(attending: Branch, feeding: Branch) -> tuple[Sublayer, ...]:
    """Attention, then the MLP: two norm sites per layer."""
    return (Sublayer("attention", (attending,)), Sublayer("feedforward", (feeding,)))


def parallel(attending: Branch, feeding: Branch) -> tuple[Sublayer, ...]:
    """Attention beside the MLP: one norm site per layer."""
    return (Sublayer("block", (attending, feeding)),)


QKV = (Reader("q_proj", ("query",)), Reader("k_proj", ("key",)), Reader("v_proj", ("value",)))
GATE_UP = (Reader("gate_proj", ("gate",)), Reader("up_proj", ("up",)))
SELF_ATTENTION = attention("input_layernorm", "self_attn", QKV, "o_proj")
GATED_MLP = mlp("post_attention_layernorm", "mlp", GATE_UP, ("down_proj",), "act_fn")
GATED_EXPERTS = mlp(
    "post_attention_layernorm",
    "mlp",
    (*GATE_UP, Reader("gate", ("router",)), Reader("experts.gate_up_proj", ("gate", "up"))),  # dense, sparse layers
    ("down_proj", "experts.down_proj"),
    "act_fn",
)

LLAMA = Architecture(sequential(SELF_ATTENTION, GATED_MLP), since="5.0")
MIXTURE_OF_EXPERTS = Architecture(sequential(SELF_ATTENTION, GATED_EXPERTS), keeps_width=True)
PHI3 = Architecture(
    sequential(
        attention("input_layernorm", "self_attn", fused_qkv("qkv_proj"), "o_proj", "resid_attn_dropout"),
        mlp(
            "post_attention_layernorm",
            "mlp",
            (Reader("gate_up_proj", ("gate", "up")),),
            ("down_proj",),
            "activation_fn",
            "resid_mlp_dropout",
        ),
    )
)
PHI = Architecture(
    parallel(
        attention("input_layernorm", "self_attn", QKV, "dense", "resid_dropout"),
        mlp("input_layernorm", "mlp", ungated("fc1"), ("fc2",), "activation_fn", "resid_dropout"),
    ),
    final_norm="model.final_layernorm",
    centered=True,
)
CROSS_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask")
GPT2 = Architecture(
    sequential(
        attention("ln_1", "attn", fused_qkv("c_attn"), "c_proj", keyword=None, withheld=CROSS_ATTENTION),
        mlp("ln_2", "mlp", ungated("c_fc"), ("c_proj",), "act"),
    ),
    embeddings=("transformer.wte", "transformer.wpe"),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    centered=True,
    positional=("past_key_values", "attention_mask", "encoder_hidden_states"),
    keeps_width=True,
    channels="n_inner",
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
            Branch(
                "final_layer_norm",
                ("fc1", "activation_fn", "fc2"),
                ungated("fc1"),
                ("fc2",),
                activation="activation_fn",
            ),
        ),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        centered=True,
        channels="ffn_dim",
    )


def gpt_neox(config: PreTrainedConfig) -> Architecture:
    """GPT-NeoX and Pythia: two norms, which read the stream at one site where the residual is parallel."""
    form = parallel if config.use_parallel_residual else sequential
    return Architecture(
        form(
            attention(
                "input_layernorm",
                "attention",
                fused_qkv("query_key_value", grouped=True),
                "dense",
                "post_attention_dropout",
                keyword=None,
            ),
            mlp(
                "post_attention_layernorm",
                "mlp",
                ungated("dense_h_to_4h"),
                ("dense_4h_to_h",),
                "act",
                "post_mlp_dropout",
            ),
        ),
        embeddings=("gpt_neox.embed_in",),
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        centered=True,
        cache="layer_past",
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
    shared_values = config.multi_query and not config.new_decoder_architecture
    norms = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "input_layernorm")
    if not in_parallel:
        norms = ("input_layernorm", "post_attention_layernorm")
    return Architecture(
        (parallel if in_parallel else sequential)(
            attention(norms[0], "self_attention", fused_qkv("query_key_value", grouped=True), "dense", keyword=None),
            mlp(norms[1], "mlp", ungated("dense_h_to_4h"), ("dense_4h_to_h",), "act"),
        ),
        embeddings=("transformer.word_embeddings",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        centered=True,
        returns_tuple=True,
        channels="ffn_hidden_size",
        value_heads=1 if shared_values else config.num_kv_heads,
        attends=False,
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
    "qwen3_moe": replace(MIXTURE_OF_EXPERTS, expert_channels="moe_intermediate_size"),
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


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the table row for the config of a causal language model.

    Raises:
        InputError: not a config, an unknown family, one to which the method does not apply, or one that needs a newer
            transformers.
    """
    if not isinstance(config, PreTrainedConfig):
        raise InputError(f"config must be a transformers causal language model's, not {type(config).__name__}.")
    if config.model_type in REFUSED:
        raise InputError(f"model type {config.model_type!r} cannot be sliced: {REFUSED[config.model_type]}.")
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise InputError(
            f"model type {config.model_type!r} is not supported: slicegpt-fast slices the decoder-only families "
            f"{', '.join(ARCHITECTURES)}."
        )
    architecture = row if isinstance(row, Architecture) else row(config)
    if Version(transformers.__version__) < Version(architecture.since):
        raise InputError(
            f"model type {config.model_type!r} needs transformers {architecture.since} or newer, this is "
            f"{transformers.__version__}: upgrade it."
        )
    return architecture
