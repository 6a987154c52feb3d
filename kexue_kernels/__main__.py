"""`python -m kexue_kernels`: see `kexue_kernels.cli`."""

from kexue_kernels.cli import main

if __name__ == "__main__":
    main()
