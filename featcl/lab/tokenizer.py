"""The laboratory's byte-level BPE tokenizers and chat templates, one per family.

Like the official ones: Gemma's template refuses a system role, and neither carries generation marks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 1408

# A word with the space before it, a number, a run of signs; capitals start a new piece (camel case).
PIECES = r" ?[A-Za-z][a-z]*| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"

OLMO_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ ('<start_of_turn>model\n' if message['role'] == 'assistant' else '<start_of_turn>user\n') }}"
    "{{ message['content'] + '<end_of_turn>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"olmo2": OLMO_TEMPLATE, "gemma2": GEMMA_TEMPLATE}
SPECIAL = {
    "olmo2": ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"),
    "gemma2": ("<eos>", "<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>user\n", "<start_of_turn>model\n"),
}


def train_tokenizer(family: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer of `olmo2` or `gemma2` on texts; the same texts give the same tokenizer.

    Every text gets a space in front, so that a word has one form wherever it stands; decoding leaves it there, and
    replies are stripped.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    special = SPECIAL[family]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>" if family == "gemma2" else None,
        eos_token=special[0], pad_token=special[1], extra_special_tokens=list(special[2:]),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = TEMPLATES[family]
    return wrapped
