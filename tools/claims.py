"""Register the claims that studies declare in figures/preregistration.md, and make the page figures/claims.md."""
from pathlib import Path

from hapnb.claims import write_claims, write_preregistration

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    # a name with an underscore in front is no study, as for `hapnb studies`
    studies = [p for p in (ROOT / "nbs" / "studies").glob("*.ipynb") if not p.name.startswith(("_", "."))]
    print(write_preregistration(studies, ROOT / "figures" / "preregistration.md"))
    print(write_claims(ROOT / "figures"))
