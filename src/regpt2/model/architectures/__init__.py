"""SHELF: one file per architecture; the file name is `model.architecture`, also in `Config`."""

from regpt2.base.shelves import Contract
from regpt2.model.language_model import GPTConfig, LanguageModel

CONTRACT = Contract(required={"Config": GPTConfig, "Model": LanguageModel})  # made by Model(config, seed=seed)
