"""A small text and a tokenizer that belongs to it."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEXT = "the cat sat on the mat and the dog lay by the door while rain fell on the old town in the long night"
WORDS = sorted(set(TEXT.split()))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of ``TEXT``, ids below 97; a beginning token where special tokens are asked for."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
