"""A reward model with TRL's RewardTrainer that stays off the unintended features, say those of a reply's length.

pip install trl            # on a CPU add --use_cpu --bf16 False: TRL's default is bfloat16 on an accelerator
python examples/reward_trainer.py --model Qwen/Qwen3-0.6B --train pairs.jsonl --unintended unintended \
    --penalty_weight 10 --dependence_weight 10 --output_dir runs/reward
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import RewardConfig, RewardTrainer

from selfreg import RegularizationArguments, RegularizationMixin, UnintendedFeatures


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "A decoder."})
    train: str = field(metadata={"help": "A .jsonl file with columns chosen and rejected, as TRL has them."})
    unintended: str = field(metadata={"help": "A folder of unintended features of layer='final'."})


class RegularizedRewardTrainer(RegularizationMixin, RewardTrainer):
    """Bradley-Terry as TRL has it, plus the two terms."""


parser = HfArgumentParser((ScriptArguments, RegularizationArguments, RewardConfig))
script, regularization, args = parser.parse_args_into_dataclasses()

trainer = RegularizedRewardTrainer(
    model=script.model,
    args=args,
    train_dataset=load_dataset("json", data_files=script.train, split="train"),
    unintended=UnintendedFeatures.from_pretrained(script.unintended),
    regularization=regularization,
)
trainer.train()
trainer.save_model(args.output_dir)
