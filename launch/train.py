"""Train a model: ``gqa-train``, or on several ranks ``torchrun ... -m gqa_parallel.launch.train``."""

from gqa_parallel.conf import schema
from gqa_parallel.conf.checks import check
from gqa_parallel.conf.schema import Config
from gqa_parallel.launch.program import program
from gqa_parallel.training.world import World

schema.register()


@program(Config, config_name="config", distributed=True)
def main(config: Config) -> None:
    check(config, World.from_environment().size)  # before the imports, which take seconds
    from gqa_parallel.training.run import run

    run(config)


if __name__ == "__main__":
    main()
