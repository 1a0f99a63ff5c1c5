"""The command line that the training examples share."""

import argparse


def training_parser(description: str | None, attention: list[str], plot: str) -> argparse.ArgumentParser:
    """Options of training runs whose attention is of `attention`: `args.attention` is a list of names."""
    def names(text: str) -> list[str]:
        chosen = ["flash", "default"] if text == "both" else text.split(",")
        if unknown := set(chosen) - set(attention):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(attention)}")
        return chosen

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=names, default="both", metavar="NAME,...",
                        help=f"a run for each, of {', '.join(attention)}; both: flash,default")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--context", type=int, default=128, help="characters a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    add_dtype(parser)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-plot", metavar="FILE", default=plot, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="append settings, speed and losses, one JSON line a run")
    return parser


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option --dtype; `args.dtype` is None where it is not given, until `default_dtype` is asked."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="of the activations (default: bfloat16 on a GPU, whose kernels run it; float32 elsewhere)")


def default_dtype(device: str) -> str:
    """The dtype of the activations where none is given; `device`: as JAX or PyTorch call its kind."""
    return "bfloat16" if device in ("gpu", "cuda") else "float32"
