import os

# before torch is imported: the ranks share two cores, and a forked child must not inherit a thread pool
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
