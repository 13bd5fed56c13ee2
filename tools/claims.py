"""Register the claims that studies declare in figures/preregistration.md, and make the page figures/claims.md."""
from pathlib import Path

from hapnb.claims import write_claims, write_preregistration

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    print(write_preregistration((ROOT / "nbs" / "studies").glob("*.ipynb"), ROOT / "figures" / "preregistration.md"))
    print(write_claims(ROOT / "figures"))
