"""``python -m tasks.deepfake``."""

from tasks.common.cli.process import start

if __name__ == "__main__":
    start("tasks.deepfake.command:group", prog_name="python -m tasks.deepfake")
