"""Makes models/: tiny random models of an independent implementation (PyTorch, Hugging Face transformers).

For each, a folder as `save_pretrained` writes it (config.json, model.safetensors) and golden.safetensors:

    tokens [B, S], mask [B, S]   contexts, one of them padded
    targets [B, L, M]            what follows
    logits [B, L, M, V]          of every token of the targets, each target run by itself with its context
    context [B, S, V]            of every position of the context (causal models)

Run it in a throw-away environment, since neither library is needed by jaxrec:

    python -m venv golden-env && golden-env/bin/pip install torch transformers
    golden-env/bin/python tests/golden/make_models.py [name ...]

Names limit what is written. All are drawn, in one order: a new model goes to the end of the list.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

FOLDER = Path(__file__).with_name("models")
VOCABULARY, BATCH, LENGTH, TARGETS, TOKENS = 40, 3, 23, 2, 4


def t5(**changes) -> T5ForConditionalGeneration:
    """A T5 whose heads are together wider than the model; few buckets, so that contexts reach the last."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        **changes,
    )
    model = T5ForConditionalGeneration(config)
    if changes.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCABULARY, 16))
    return model


def qwen2() -> Qwen2ForCausalLM:
    """Tied, four heads of queries over two of keys and values."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    return Qwen2ForCausalLM(config)


def bart() -> BartForConditionalGeneration:
    """The sides differ in depth; few positions more than a context has tokens; a bias of the logits."""
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=26,
        decoder_start_token_id=2,
    )
    model = BartForConditionalGeneration(config)
    torch.nn.init.normal_(model.final_logits_bias)
    return model


def mt5() -> MT5ForConditionalGeneration:
    """Gated, with a head of its own."""
    config = MT5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2
    )
    model = MT5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCABULARY, 16))
    return model


def qwen3() -> Qwen3ForCausalLM:
    """Untied; heads that are together wider than the model, normalised one by one."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    return Qwen3ForCausalLM(config)


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter is drawn, norms and biases too, large enough to matter and small enough to compare."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.3)
        else:
            table = "relative_attention_bias" in name or "embed" in name or "shared" in name
            torch.nn.init.normal_(weight, 0.0, 1.0 if table else 0.3)
    return model.eval()


def draw(left: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contexts with mask, the second padded on one side, and their targets."""
    tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, slice(None, 9) if left else slice(-9, None)] = 0
    return tokens * mask, mask, torch.randint(1, VOCABULARY, (BATCH, TARGETS, TOKENS))


def encoder_decoder_golden(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tokens, mask, targets = draw(left=False)
    inputs = torch.nn.functional.pad(targets[..., :-1], (1, 0), value=model.config.decoder_start_token_id)
    seen = torch.ones_like(inputs[:, 0])  # a token of padding in a target is a token
    logits = [
        model(
            input_ids=tokens, attention_mask=mask, decoder_input_ids=inputs[:, one], decoder_attention_mask=seen
        ).logits
        for one in range(TARGETS)
    ]
    return {"tokens": tokens, "mask": mask, "targets": targets, "logits": torch.stack(logits, 1)}


def causal_golden(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tokens, mask, targets = draw(left=True)
    logits = []
    for one in range(TARGETS):
        whole = torch.cat([tokens, targets[:, one]], 1)
        seen = torch.cat([mask, torch.ones_like(targets[:, one])], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits.append(model(input_ids=whole, attention_mask=seen, position_ids=positions).logits)
    return {
        "tokens": tokens,
        "mask": mask,
        "targets": targets,
        "logits": torch.stack([each[:, LENGTH - 1 : -1] for each in logits], 1),
        "context": logits[0][:, :LENGTH],
    }


def _drawn(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    randomise(model)
    with torch.no_grad():
        return model, encoder_decoder_golden(model) if model.config.is_encoder_decoder else causal_golden(model)


def main() -> None:
    torch.manual_seed(0)
    first = {
        "t5_relu_tied": t5(feed_forward_proj="relu"),
        "t5_gated_untied": t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "qwen2_tied": qwen2(),
    }
    # Made after those are drawn, which keeps their bits.
    later = {"bart_tied": bart, "mt5_untied": mt5, "qwen3_untied": qwen3}
    drawn = {name: _drawn(model) for name, model in first.items()}
    drawn |= {name: _drawn(make()) for name, make in later.items()}
    for name in sys.argv[1:] or drawn:
        model, golden = drawn[name]
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        tensors = {key: value.to(torch.int32 if value.dtype == torch.long else value.dtype).contiguous()
                   for key, value in golden.items()}  # fmt: skip
        save_file(tensors, FOLDER / name / "golden.safetensors")


if __name__ == "__main__":
    main()
