"""``python -m fastflow``: the trainer's command line."""

from fastflow.trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
