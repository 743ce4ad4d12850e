"""``python -m tasks.retrieval``."""

from tasks.common.cli.process import start

if __name__ == "__main__":
    start("tasks.retrieval.command:group", prog_name="python -m tasks.retrieval")
