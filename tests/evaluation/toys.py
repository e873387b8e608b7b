"""Small things the evaluation tests share: a word-level tokenizer with a chat template, random models, items."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from featcl.evaluation.scoring import encode_item
from featcl.lab.items import Item
from featcl.streams.chat import Chat

WORDS = [f"w{index}" for index in range(40)]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] + ' ' + message['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}"
)


def chat() -> Chat:
    vocabulary = ["<pad>", "<bos>", "<eos>", "<turn>", "<end>", "<unk>", "system", "user", "assistant", *WORDS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>", "<end>"],
    )
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer)


def model(family: str = "olmo2", *, seed: int = 0, vocab: int = 64) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    if family == "gemma2":
        config = Gemma2Config(**sizes, head_dim=16, sliding_window=8, query_pre_attn_scalar=16)
        return Gemma2ForCausalLM(config).eval()
    return Olmo2ForCausalLM(Olmo2Config(**sizes)).eval()


def item(name: str, question: str, answer: str, *, task: str = "toy", grader: Any = "exact") -> Item:
    return Item(name, task, ({"role": "user", "content": question},), answer, grader)


@torch.no_grad()
def greedy(network: Any, prompt: list[int], *, stop_ids: frozenset[int], steps: int) -> list[int]:
    """The plainest possible greedy decoding: one full forward per token, no batch, no cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


def teach(network: Any, chat: Chat, items: list[Item], *, steps: int = 60) -> Any:
    """Train a random model until it answers the items, and turn it back to evaluation."""
    replies = [encode_item(chat, item) for item in items]
    width = max(len(reply.input_ids) for reply in replies)
    ids = torch.zeros(len(replies), width, dtype=torch.long)
    labels = torch.full((len(replies), width), -100)
    for row, reply in enumerate(replies):
        ids[row, : len(reply.input_ids)] = torch.tensor(reply.input_ids)
        wanted = torch.tensor(reply.loss_mask).nonzero()[:, 0]
        labels[row, wanted] = ids[row, wanted]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    network.requires_grad_(False)
    return network.eval()
