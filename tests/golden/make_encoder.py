"""Makes encoder.json: sentence vectors of an independent implementation (PyTorch, Hugging Face transformers).

Run it in a throw-away environment, since neither library is needed by jaxrec:

    python -m venv golden-env && golden-env/bin/pip install torch transformers
    golden-env/bin/python tests/golden/make_encoder.py <folder with model.safetensors and tokenizer.json>
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel

TEXTS = [
    "",
    "milk",
    "GROCERY SOFT DRINKS 12/18&15PK CAN CAR National brand 1.5 L",
    "Fluid milk products, white only, private label, 1 gallon",
    "Crème brûlée à la vanille, 4 × 100 g",
    "东北大米 5kg 新米",
    "Кофе в зёрнах, 1 кг",
    "مكسرات مشكلة 500 غرام",
    "🍕 frozen pizza 🍕 pepperoni!!!",
    "a\ttab, a\nnew line, a \u200bzero-width space and a \x00null",
    "supercalifragilisticexpialidocious" * 8,
    "Shampoo for dry hair, with argan oil and keratin; free of silicones and parabens. " * 12,
    "The same words in the same order. " * 40,
]
MAX_TOKENS = 128


def embed(folder: str, texts: list[str]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


if __name__ == "__main__":
    vectors = [[round(value, 6) for value in row] for row in embed(sys.argv[1], TEXTS).tolist()]
    golden = {"torch": torch.__version__, "max_tokens": MAX_TOKENS, "texts": TEXTS, "vectors": vectors}
    Path(__file__).with_name("encoder.json").write_text(json.dumps(golden, ensure_ascii=True) + "\n")
