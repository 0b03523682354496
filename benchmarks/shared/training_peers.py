"""Training steps by PyTorch (transformers' T5 and Qwen2), in an environment of their own; started by
benchmarks/training.py.

    PYTHON benchmarks/shared/training_peers.py FOLDER THREADS

FOLDER holds, for every case NAME, NAME/config.json and NAME/model.safetensors in Hugging Face's layout, and NAME/*.npy.
A line of JSON on standard input asks for one step: {"case": NAME, "fresh": true to begin from the weights again}; the
line that answers has `milliseconds` and `loss`.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

RATE = 1e-3


class Steps:
    """A model, what it is trained on, and its optimiser; a call makes one step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked = json.loads((folder / "case.json").read_text())
        self.arrays = {path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.npy")}
        self.begin()

    def begin(self) -> None:
        """The weights as they are in the folder."""
        kind = transformers.T5ForConditionalGeneration if self.asked["t5"] else transformers.Qwen2ForCausalLM
        self.model = kind.from_pretrained(self.folder, **self.asked["config"]).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01, fused=True)

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = getattr(self, self.asked["loss"])()
        loss.backward()
        if self.asked["update"]:
            self.optimizer.step()
        return float(loss.detach())

    def targets(self) -> torch.Tensor:
        """Mean cross-entropy of the targets' tokens [B, M] given contexts [B, S]."""
        return self.model(**self.contexts(), labels=self.arrays["targets"], use_cache=False).loss

    def next_tokens(self) -> torch.Tensor:
        """Mean cross-entropy of every token of [B, S] after the first."""
        tokens, mask = self.arrays["contexts"], self.arrays["mask"]
        return self.model(**self.contexts(), labels=tokens.where(mask > 0, -100), use_cache=False).loss

    def contexts(self) -> dict[str, torch.Tensor]:
        """The contexts, with a mask where some are padded, which costs something."""
        mask = self.arrays["mask"]
        padded = {} if bool(mask.all()) else {"attention_mask": mask}
        return {"input_ids": self.arrays["contexts"], **padded}

    def preference(self) -> torch.Tensor:
        """-log of the first target's share among the L targets of a prompt."""
        return -self.likelihoods().log_softmax(-1)[:, 0].mean()

    def grpo(self) -> torch.Tensor:
        """GRPO of L candidates of a prompt where they were drawn: the value is the mean of A log pi."""
        policy, advantage = self.likelihoods(), self.arrays["advantage"]
        ratio = (policy - policy.detach()).exp()
        least = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return (-least + (policy * advantage).detach()).mean()

    def likelihoods(self) -> torch.Tensor:
        """log-likelihoods [B, L] of the L targets of a prompt, each scored behind a copy of the prompt."""
        prompts, targets = self.arrays["contexts"], self.arrays["targets"]
        batch, count, length = targets.shape
        rows = torch.cat([prompts.repeat_interleave(count, 0), targets.reshape(batch * count, length)], dim=1)
        # Only the logits that predict a target's tokens are made.
        logits = self.model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=length).logits
        found = logits.log_softmax(-1).gather(-1, rows[:, -length:, None])[..., 0].sum(-1)
        return found.reshape(batch, count)


def main() -> None:
    """Answers lines until there are no more."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    transformers.logging.set_verbosity_error()
    made: dict[str, Steps] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked["case"]
        if name not in made:
            made = {name: Steps(folder / name)}
        elif asked.get("fresh"):
            made[name].begin()
        start = time.perf_counter()
        loss = made[name]()
        print(json.dumps({"milliseconds": 1e3 * (time.perf_counter() - start), "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
