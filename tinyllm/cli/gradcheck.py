"""Check the derivative of every op, loss and layer against finite differences of its forward, and print the errors."""
import argparse

from tinyllm.cli.arguments import number
from tinyllm.config import suggestion
from tinyllm.gradcheck import gradcheck
from tinyllm.nn.cases import LAYERS
from tinyllm.ops.cases import CASES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which, and how exactly."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="ops, losses or layers, such as rmsnorm or Attention (default: all)")
    parser.add_argument("--tolerance", type=number, default=1e-6, metavar="X", help="largest relative error (default: 1e-6)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")


def run(args: argparse.Namespace) -> int:
    """A line a case; 0 when all agree, 1 when one does not."""
    checks = [(c.op, c.label, lambda c=c: gradcheck(c.function, *c.arrays(), tolerance=args.tolerance)) for c in CASES]
    checks += [(c.layer.__name__, c.label, lambda c=c: c.check(tolerance=args.tolerance)) for c in LAYERS]
    known = list(dict.fromkeys(name for name, _, _ in checks))
    if args.list:
        print("\n".join(known))
        return 0
    for name in args.names:
        if name not in known:
            raise ValueError(f"gradcheck knows no op or layer {name!r}{suggestion(name, known)} (tinyllm gradcheck --list prints all)")
    header, failed = f"{'name':<22}{'case':<44}{'error':>9}  worst element\n", 0
    for name, label, check in checks:
        if not args.names or name in args.names:
            report = check()
            failed += not report
            worst = report.worst
            mark = "" if report else f"  FAILED: backward {worst.analytic:.8g}, numeric {worst.numeric:.8g}"
            print(f"{header}{name:<22}{label:<44}{report.error:>9.1e}  {worst.name} at {worst.where}{mark}", flush=True)
            header = ""  # only once there is something below it: a refused tolerance prints no table
    print(f"{failed} failed" if failed else f"all within {args.tolerance:g}")
    return 1 if failed else 0
