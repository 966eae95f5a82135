"""Where each Hugging Face family keeps the parts that touch the residual stream: one row per family.

A decoder layer is a sequence of sublayers. Each reads the residual stream at one point, its *norm site*, through one or
more branches and adds their outputs: ``h <- h + module(norm(h)) [+ module'(norm'(h))]``. A branch's *readers* are the
weights whose input is the normalised stream, its *writers* those whose output is added to the stream. Slicing narrows
the inputs of readers and the outputs of writers; heads, rotary embeddings, query norms and caches are left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedConfig

from slicegpt_fast.errors import InputError

Output = Literal["query", "key", "value", "latent", "gate", "up", "router"]
Axis = Literal["stream", "channels", "values"]
AXES: tuple[Axis, ...] = get_args(Axis)
Refusal = tuple[Axis, str]  # of cuts along an axis, with the reason


@dataclass(frozen=True)
class Reader:
    """A linear module, or a parameter of shape [experts, out, in], that reads the normalised stream.

    Attributes:
        path: inside the decoder layer.
        outputs: what its rows compute, in order: an attention's queries, keys and values, or the ``latent`` that these
            are made of; the halves ``gate`` and ``up`` of a gated feed-forward network (``up`` alone where it has no
            gate), or an expert's ``router`` score.
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
        multiplier: the attribute of the layer that scales what the branch adds to the stream; None where nothing does.
    """

    norm: str
    modules: tuple[str, ...]
    inputs: tuple[Reader, ...]
    writers: tuple[str, ...]
    takes_layer_arguments: bool = False
    keyword: str | None = None
    withheld: tuple[str, ...] = ()
    activation: str | None = None
    multiplier: str | None = None

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
        experts_per_token: what it calls how many experts a token is routed to.
        cache: by which argument a decoder layer is given the cache.
        norm_offset: what its norms add to their weights.
        refused: the axes that its layers cannot be cut along, each with the reason.
        resizable: its code ties no other size or factor to the hidden size, so that a plain export may change it.
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
    experts_per_token: str = "num_experts_per_tok"
    cache: str = "past_key_values"
    norm_offset: float = 0.0
    refused: tuple[Refusal, ...] = ()
    resizable: bool = True
    attends: bool = True
    since: str = "5.17"

    def experts_of(self, config: PreTrainedConfig) -> int:
        """Return how many experts a token is routed to in a model of this config."""
        return int(getattr(config, self.experts_per_token))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that its layers can be cut along."""
        return tuple(axis for axis in AXES if axis not in dict(self.refused))

    def gain(self, norm: Any) -> Tensor | None:
        """Return what a norm multiplies the normalised stream by, [D], or None where it is 1."""
        weight = getattr(norm, "weight", None)
        return weight if weight is None or not self.norm_offset else weight + self.norm_offset

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


def experts(router: str = "gate", shared: str | None = None, gate: str | None = None) -> Branch:
    """A gated MLP, in some layers a mixture of them, of ``shared`` ones too; ``router`` and ``gate`` weight them."""
    ours = () if shared is None else _inside(shared, GATE_UP)
    scores = tuple(Reader(path, ("router",)) for path in (router, gate) if path is not None)
    return mlp(
        "post_attention_layernorm",
        "mlp",
        (*GATE_UP, *scores, Reader("experts.gate_up_proj", ("gate", "up")), *ours),
        ("down_proj", "experts.down_proj", *([] if shared is None else [f"{shared}.down_proj"])),
        "act_fn",
    )


LLAMA = Architecture(sequential(SELF_ATTENTION, GATED_MLP), since="5.0")
# Rotary angles of neighbours or not in all layers, norms behind them, scaled queries: not the attention of `attend`.
OWN_ATTENTION = replace(LLAMA, attends=False)
ARCEE = Architecture(
    sequential(SELF_ATTENTION, mlp("post_attention_layernorm", "mlp", ungated("up_proj"), ("down_proj",), "act_fn"))
)
GLM = Architecture(
    sequential(
        SELF_ATTENTION,
        mlp(
            "post_attention_layernorm",
            "mlp",
            (Reader("gate_up_proj", ("gate", "up")),),
            ("down_proj",),
            "activation_fn",
        ),
    ),
    attends=False,
)
COHERE = Architecture(
    parallel(SELF_ATTENTION, replace(GATED_MLP, norm="input_layernorm")), centered=True, attends=False
)
GPTJ = Architecture(
    parallel(
        attention("ln_1", "attn", QKV, "out_proj"),
        mlp("ln_1", "mlp", ungated("fc_in"), ("fc_out",), "act"),
    ),
    embeddings=("transformer.wte",),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    centered=True,
    returns_tuple=True,
    keeps_width=True,
    channels="n_inner",
    cache="layer_past",
    attends=False,
)
GPT_NEO = Architecture(
    sequential(
        attention("ln_1", "attn", _inside("attention", QKV), "attention.out_proj", keyword=None),
        mlp("ln_2", "mlp", ungated("c_fc"), ("c_proj",), "act"),
    ),
    embeddings=("transformer.wte", "transformer.wpe"),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    centered=True,
    returns_tuple=True,
    keeps_width=True,
    cache="layer_past",
    attends=False,
)
PERSIMMON = Architecture(
    sequential(
        attention("input_layernorm", "self_attn", fused_qkv("query_key_value", grouped=True), "dense"),
        mlp("post_attention_layernorm", "mlp", ungated("dense_h_to_4h"), ("dense_4h_to_h",), "act", "dropout"),
    ),
    final_norm="model.final_layernorm",
    centered=True,
    attends=False,
)
STARCODER2 = Architecture(
    sequential(SELF_ATTENTION, mlp("post_attention_layernorm", "mlp", ungated("c_fc"), ("c_proj",), "act")),
    centered=True,
)
MIXTURE_OF_EXPERTS = Architecture(sequential(SELF_ATTENTION, experts()), keeps_width=True)
UNEVEN_EXPERTS: Refusal = ("channels", "the experts that all tokens share have other channels than those of the others")
SHARED_EXPERTS = Architecture(
    sequential(SELF_ATTENTION, experts(shared="shared_experts")),
    keeps_width=True,
    expert_channels="moe_intermediate_size",
    refused=(UNEVEN_EXPERTS,),
    attends=False,
)
LATENT = (Reader("q_proj", ("query",)), Reader("q_a_proj", ("latent",)), Reader("kv_a_proj_with_mqa", ("latent",)))
LATENT_ATTENTION = attention("input_layernorm", "self_attn", LATENT, "o_proj")
SHARED_LATENT: Refusal = ("values", "its heads make their values of one latent vector")
DEEPSEEK = replace(
    SHARED_EXPERTS,
    sublayers=sequential(LATENT_ATTENTION, experts(shared="shared_experts")),
    refused=(UNEVEN_EXPERTS, SHARED_LATENT),
)
GEMMA = replace(LLAMA, norm_offset=1.0)
NEMOTRON = replace(ARCEE, centered=True, norm_offset=1.0)
NORMED_CHANNELS: Refusal = ("channels", "a norm over all of them stands before the output projection")
NORMED_VALUES: Refusal = ("values", "a norm stands between them and the output projection")
BITNET = replace(LLAMA, refused=(NORMED_CHANNELS, NORMED_VALUES), resizable=False, attends=False)


def scaled(architecture: Architecture, multiplier: str) -> Architecture:
    """The row of a family whose layers scale what each branch adds to the stream by an attribute."""
    sublayers = (
        replace(sublayer, branches=tuple(replace(branch, multiplier=multiplier) for branch in sublayer.branches))
        for sublayer in architecture.sublayers
    )
    return replace(architecture, sublayers=tuple(sublayers))


GRANITE = replace(scaled(LLAMA, "residual_multiplier"), since="5.17")
LATENT_LLAMA = replace(
    LLAMA, sublayers=sequential(LATENT_ATTENTION, GATED_MLP), refused=(SHARED_LATENT,), attends=False
)
APERTUS = Architecture(
    sequential(
        replace(SELF_ATTENTION, norm="attention_layernorm"),
        mlp("feedforward_layernorm", "mlp", ungated("up_proj"), ("down_proj",), "act_fn"),
    ),
    attends=False,
)
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


BIOGPT = Architecture(
    sequential(
        attention("self_attn_layer_norm", "self_attn", QKV, "out_proj"),
        Branch(
            "final_layer_norm", ("fc1", "activation_fn", "fc2"), ungated("fc1"), ("fc2",), activation="activation_fn"
        ),
    ),
    embeddings=("biogpt.embed_tokens", "biogpt.embed_positions"),
    layers="biogpt.layers",
    final_norm="biogpt.layer_norm",
    centered=True,
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


def gpt_bigcode(config: PreTrainedConfig) -> Architecture:
    """GPT-BigCode (StarCoder): one key and value head for all queries, or one for each."""
    return Architecture(
        sequential(
            attention("ln_1", "attn", fused_qkv("c_attn", grouped=not config.multi_query), "c_proj", keyword=None),
            mlp("ln_2", "mlp", ungated("c_fc"), ("c_proj",), "act"),
        ),
        embeddings=("transformer.wte", "transformer.wpe"),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        centered=True,
        keeps_width=True,
        channels="n_inner",
        value_heads=1 if config.multi_query else None,
        cache="layer_past",
    )


def stablelm(config: PreTrainedConfig) -> Architecture:
    """StableLM: Llama's layer with LayerNorms; the parallel form shares one norm."""
    shared = config.use_parallel_residual
    feeding = replace(GATED_MLP, norm="input_layernorm" if shared else GATED_MLP.norm, modules=("mlp", "dropout"))
    return Architecture((parallel if shared else sequential)(SELF_ATTENTION, feeding), centered=True)


OUTPUT_NORMS = "a weighted norm stands between each output projection and the stream, and no rotation passes through it"


def hyperclovax(config: PreTrainedConfig) -> Architecture:
    """HyperCLOVA X without its optional norms behind the branches."""
    if config.use_post_norm:
        raise InputError(f"this HyperCLOVA X cannot be sliced: {OUTPUT_NORMS}.")
    return GRANITE


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
    "apertus": APERTUS,
    "arcee": ARCEE,
    "biogpt": BIOGPT,
    "bitnet": BITNET,
    "cohere": COHERE,
    "cohere2": COHERE,
    "cohere2_moe": replace(
        COHERE, sublayers=parallel(SELF_ATTENTION, replace(experts(), norm="input_layernorm")), keeps_width=True
    ),
    "cwm": LLAMA,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "dots1": SHARED_EXPERTS,
    "ernie4_5": OWN_ATTENTION,
    "exaone_moe": SHARED_EXPERTS,
    "falcon": falcon,
    "gemma": GEMMA,
    "glm": GLM,
    "glm4_moe": SHARED_EXPERTS,
    "glm4_moe_lite": DEEPSEEK,
    "gpt2": GPT2,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neo": GPT_NEO,
    "gpt_neox": gpt_neox,
    "gptj": GPTJ,
    "granite": GRANITE,
    "helium": replace(OWN_ATTENTION, resizable=False),
    "hunyuan_v1_dense": OWN_ATTENTION,
    "hunyuan_v1_moe": replace(
        SHARED_EXPERTS,
        experts_per_token="moe_topk",
        sublayers=sequential(SELF_ATTENTION, experts("gate.wg", "shared_mlp")),
    ),
    "hy_v3": SHARED_EXPERTS,
    "hyperclovax": hyperclovax,
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "jais2": replace(ARCEE, centered=True),
    "llama": LLAMA,
    "mellum": replace(MIXTURE_OF_EXPERTS, expert_channels="moe_intermediate_size"),
    "minicpm3": replace(scaled(LATENT_LLAMA, "residual_scale"), resizable=False),
    "minimax_m2": replace(MIXTURE_OF_EXPERTS, attends=False),
    "ministral": LLAMA,
    "ministral3": OWN_ATTENTION,
    "mistral": LLAMA,
    "mixtral": MIXTURE_OF_EXPERTS,
    "nemotron": NEMOTRON,
    "olmoe": replace(MIXTURE_OF_EXPERTS, resizable=False, attends=False),
    "opt": opt,
    "persimmon": PERSIMMON,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen2_moe": replace(
        SHARED_EXPERTS, sublayers=sequential(SELF_ATTENTION, experts(shared="shared_expert", gate="shared_expert_gate"))
    ),
    "qwen3": LLAMA,
    "qwen3_moe": replace(MIXTURE_OF_EXPERTS, expert_channels="moe_intermediate_size"),
    "seed_oss": LLAMA,
    "smollm3": OWN_ATTENTION,
    "solar_open": SHARED_EXPERTS,
    "stablelm": stablelm,
    "starcoder2": STARCODER2,
    "vaultgemma": replace(
        GEMMA, sublayers=sequential(SELF_ATTENTION, replace(GATED_MLP, norm="pre_feedforward_layernorm"))
    ),
    "youtu": LATENT_LLAMA,
}

ENCODER = "it is an encoder"
HALF = "it is one half of a model with an encoder"
BEHIND = "its norms stand behind its residual additions"
RECURRENT = "some or all of its layers are recurrent, and no row of the table describes these"
MANY_SENSES = "it is a model of images or sound as well as text"
FIXED_WIDTH = "its mixture of experts holds the stream to the width in its config"
NO_ROW = "no row of the table describes it yet"
# Why the method, or this package, does not take the other causal language models of transformers.
REFUSED = {
    model_type: reason
    for reason, model_types in {
        OUTPUT_NORMS: (
            "afmoe axk1 exaone4 flex_olmo gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant "
            "gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text glm4 kolibri1 olmo2 olmo3"
        ),
        ENCODER: (
            "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert "
            "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
        ),
        HALF: (
            "bart bigbird_pegasus blenderbot blenderbot-small marian mbart moshi musicgen musicgen_melody mvp pegasus "
            "plbart prophetnet trocr whisper"
        ),
        BEHIND: "openai-gpt xlm xlnet",
        RECURRENT: (
            "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba "
            "mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
            "recurrent_gemma rwkv xlstm zamba zamba2"
        ),
        MANY_SENSES: ("emu3 fuyu git got_ocr2 llama4 mllama moss_transcribe_diarize phi4_multimodal"),
        FIXED_WIDTH: "ernie4_5_moe granitemoe granitemoe_swa granitemoeshared",
        "a norm stands behind its embedding table": "bloom nanochat",
        "its feed-forward network adds the stream itself": "mpt",
        "sines of the positions are added to its stream": "xglm",
        "weights of each dimension stand on its residual path": "doge",
        "its norms have biases, which its experts have nowhere to take in": "phimoe",
        "its experts hold their weights transposed": "aria_text gpt_oss llama4_text",
        "its norms are networks themselves": "axk2",
        NO_ROW: (
            "beam blt codegen cohere_compass_text cpmant ctrl dbrx deepseek_v32 deepseek_v4 diffllama dots3_note "
            "dots3_note_text flint glm_moe_dsa gpt_neox_japanese granite_swa hrm_text hy_v4 inkling2_text inkling_text "
            "jetmoe laguna longcat_flash mimo_v2_flash minimax_m3_vl_text modernbert-decoder olmo qwen4_exp "
            "qwen4_exp_text zaya"
        ),
    }.items()
    for model_type in model_types.split()
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
