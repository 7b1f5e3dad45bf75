"""transformers: models of text, with the losses they are trained with."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from entry import Entry
from torch import Tensor, nn

WIDTH, VOCABULARY, LENGTH = 32, 60, 12
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def loss_and_logits(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss that a model returns when it is given labels, and its logits."""
    result = net(**batch)
    return result.loss, result.logits


def causal() -> dict[str, Tensor]:
    """Text to be continued."""
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH))
    return {"input_ids": tokens, "labels": tokens}


def masked() -> dict[str, Tensor]:
    """Text with labels at some places, and padding at the end of one."""
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH))
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(torch.rand(2, LENGTH) < 0.4, -100)}


def classified() -> dict[str, Tensor]:
    """Text of one of three classes."""
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH)), "labels": torch.randint(3, (2,))}


def translated() -> dict[str, Tensor]:
    """Text and its translation."""
    text = torch.randint(3, VOCABULARY, (2, 2, LENGTH))
    return {"input_ids": text[0], "labels": text[1]}


def _entry(name: str, make: Callable[[], nn.Module], batch: Callable[[], Any]) -> Entry:
    return Entry("transformers", name, make, batch, loss_and_logits)


ENTRIES = (
    _entry("BERT", lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), masked),
    _entry(
        "GPT-2",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=1)
        ),
        causal,
    ),
    _entry("Llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), causal),
    _entry(
        "T5",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        translated,
    ),
    _entry(
        "DistilBERT",
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=VOCABULARY,
                dim=WIDTH,
                n_layers=2,
                n_heads=4,
                hidden_dim=64,
                num_labels=3,
                max_position_embeddings=32,
            )
        ),
        classified,
    ),
    _entry("RoBERTa", lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT)), masked),
    _entry("ELECTRA", lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**TEXT, embedding_size=16)), masked),
    _entry("Mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, head_dim=8)), causal),
    _entry("Qwen2", lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)), causal),
    _entry("Gemma", lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=8)), causal),
    _entry(
        "Mixtral",
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
        causal,
    ),
    _entry(
        "Mamba",
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=8)
        ),
        causal,
    ),
    _entry(
        "OPT",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                max_position_embeddings=32,
                word_embed_proj_dim=WIDTH,
            )
        ),
        causal,
    ),
    _entry(
        "BART",
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=32,
            )
        ),
        translated,
    ),
)
