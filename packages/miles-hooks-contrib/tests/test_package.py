import subprocess
import sys


def test_the_package_needs_nothing_but_miles_api():
    code = "import sys, msgspec; old = set(sys.modules); import miles_hooks_contrib; print(*set(sys.modules) - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in run.stdout.split()}
    assert roots - sys.stdlib_module_names <= {"miles_hooks_contrib", "miles_api"}
