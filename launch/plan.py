"""placeholder"""
from gqa_parallel.conf import schema
from gqa_parallel.launch.program import program
schema.register()
@program(schema.Config, "config")
def main(cfg):
    print(cfg)
if __name__ == "__main__":
    main()
