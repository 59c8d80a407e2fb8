"""`python -m hf_qep` is `hf-qep`, for launchers that start a module."""

from hf_qep.cli import main

if __name__ == "__main__":
    main()
