"""Turn text into an indexed dataset to train on.

gqa-prepare-data source=corpus/ target=data/corpus tokenizer=byte
gqa-prepare-data source=[a.jsonl,b.jsonl] target=data/ab tokenizer=path/to/tokenizer text_field=content
gqa-prepare-data source=src/ target=data/code suffixes=[.py,.md]
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from gqa_parallel.data.prepare import SUFFIXES, prepare
from gqa_parallel.errors import UserError
from gqa_parallel.launch.program import program


@dataclass
class PrepareDataConfig:
    """See ``gqa_parallel.data.prepare.prepare``."""

    source: Any = None  # a file or folder, or a list of them
    target: str | None = None  # prefix of the .bin, .idx and .json files
    tokenizer: str = "byte"  # byte, or a folder / tokenizer.json of Hugging Face
    text_field: str = "text"  # of a line of .jsonl
    suffixes: list[str] = field(default_factory=lambda: list(SUFFIXES))  # files to read
    workers: int | None = None  # processes; null: one per core
    overwrite: bool = False


ConfigStore.instance().store(name="prepare_data_schema", node=PrepareDataConfig)


@program(PrepareDataConfig, "prepare_data")
def main(config: PrepareDataConfig) -> None:
    if not config.source or not config.target:
        raise UserError(
            f"source ({config.source}) and target ({config.target}) must be given: the one is read, the "
            f"other written. Use gqa-prepare-data source=FOLDER target=data/NAME."
        )
    start = time.monotonic()
    prepared = prepare(
        sources=config.source if isinstance(config.source, list) else [config.source],
        target=config.target,
        tokenizer=config.tokenizer,
        text_field=config.text_field,
        suffixes=config.suffixes,
        workers=config.workers,
        overwrite=config.overwrite,
    )
    seconds = time.monotonic() - start
    if prepared.repaired:
        print(
            f"warning: {prepared.repaired} documents are not valid UTF-8; their bad bytes became U+FFFD",
            file=sys.stderr,
        )
    print(
        f"{config.target}: {prepared.documents} documents, {prepared.tokens} tokens "
        f"from {prepared.bytes} bytes in {seconds:.1f} s"
    )
    tokenizer = "" if config.tokenizer == "byte" else f" data.tokenizer={config.tokenizer}"
    print(f"gqa-train data.paths=[{config.target}]{tokenizer}")


if __name__ == "__main__":
    main()
