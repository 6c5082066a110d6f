"""Train a model: ``gqa-train``, or on several ranks ``torchrun ... -m gqa_parallel.launch.train``."""

from gqa_parallel.conf import schema
from gqa_parallel.conf.schema import Config
from gqa_parallel.launch.program import program

schema.register()


@program(Config, config_name="config", distributed=True)
def main(config: Config) -> None:
    from gqa_parallel.training.run import run

    run(config)


if __name__ == "__main__":
    main()
