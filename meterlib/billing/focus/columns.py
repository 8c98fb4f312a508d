"""The columns of FOCUS (the FinOps cost and usage specification), and what of a rated row each of them holds. Pure.

One row stands for one kind of token, of one customer, at one price, in one charge period. What the specification has
columns for that meterlib knows nothing of (commitments, resources, capacity) is there and null: validators take a
missing column for an error. What meterlib knows and the specification has no column for begins with `x_`.

- *Who.* The customer is the billing account. What it pays the operator for, the operator provides and invoices; what
  its own provider key paid for, the provider does, and `BilledCost` is 0.
- *How much.* Prices are per 1,000,000 tokens or 1,000 requests, so the product of price and quantity is the cost to the
  last digit; no number here was ever a float.
- *No price* is null prices and quantities, `x_Unpriced` with the reason, and costs of 0, since the specification allows
  no null there; `x_Quantity` has the tokens all the same.
- *A fee* on the use of a customer's own key is a row of its own. Its `ConsumedUnit` is another one, so that tokens
  that were used once are not counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from meterlib.billing.duck import quoted

Version = Literal["1.2", "1.3", "1.4"]
VERSIONS: tuple[Version, ...] = ("1.2", "1.3", "1.4")

TEXT, DECIMAL, MOMENT, WHOLE = "VARCHAR", "DECIMAL", "TIMESTAMP", "BIGINT"
NAME = "VARCHAR /* begins as somebody else chose */"

_PRICED = "unpriced = ''"
_FEE = "charge = 'platform_fee'"
_TOKENS = "per = 1000000"
_MODEL = "coalesce(nullif(price_model, ''), nullif(model, ''), 'unknown')"
_SKU = f"concat_ws('/', {_MODEL}, token_type, if(charge = 'usage', NULL, charge))"
_TIER = f"concat_ws('/', {_SKU}, variant, geo, above, coalesce(nullif(price_from, ''), 'always'), price_digest[1:8])"
_DETAILS = (
    "to_json({'x_TokenType': token_type, 'x_CacheTtl': CASE token_type WHEN 'cache_write_5m' THEN '5m'"
    " WHEN 'cache_write_1h' THEN '1h' END, 'x_Service': variant, 'x_InferenceGeo': geo, 'x_PromptAbove': above})"
)
_DESCRIPTION = (
    "concat_ws(', ', coalesce(nullif(model, ''), 'unknown model') || ' ' || replace(token_type, '_', ' '),"
    " nullif(variant, 'standard'),"
    " if(geo = 'global', NULL, 'in ' || geo), if(above = 0, NULL, 'prompts over ' || above || ' tokens'),"
    f" if({_FEE}, 'platform fee', if(funding = 'own', 'own key', NULL)), if({_PRICED}, NULL, 'no price'))"
)
_WHOLE = "DECIMAL(32,0)"
_QUANTITY = (
    f"if({_TOKENS}, quantity::{_WHOLE} * 0.000001::DECIMAL(6,6), (quantity::{_WHOLE} * 0.001::DECIMAL(6,3))"
    "::DECIMAL(38,6))"
)


def _if_priced(how: str) -> str:
    return f"if({_PRICED}, {how}, NULL)"


_WHO_BEFORE_1_4 = {"ProviderName": (NAME, "seller"), "PublisherName": (NAME, "maker")}
_WHO_FROM_1_3 = {"ServiceProviderName": (NAME, "seller"), "HostProviderName": (NAME, "maker")}
_COMMON: Mapping[str, tuple[str, str]] = {
    "InvoiceIssuerName": (NAME, "seller"),
    "InvoiceId": (TEXT, "NULL"),
    "BillingAccountId": (NAME, "tenant"),
    "BillingAccountName": (NAME, "tenant"),
    "BillingAccountType": (TEXT, "'Tenant'"),
    "SubAccountId": (NAME, "sub_account"),
    "SubAccountName": (NAME, "sub_account"),
    "SubAccountType": (TEXT, "sub_account_type"),
    "BillingPeriodStart": (MOMENT, "make_timestamp_ms(billing_start_ms)"),
    "BillingPeriodEnd": (MOMENT, "make_timestamp_ms(billing_end_ms)"),
    "ChargePeriodStart": (MOMENT, "make_timestamp_ms(charge_start_ms)"),
    "ChargePeriodEnd": (MOMENT, "make_timestamp_ms(charge_end_ms)"),
    "ChargeCategory": (TEXT, "'Usage'"),
    "ChargeClass": (TEXT, "if(corrects = '', NULL, 'Correction')"),
    "ChargeDescription": (NAME, _DESCRIPTION),
    "ChargeFrequency": (TEXT, "'Usage-Based'"),
    "BilledCost": (DECIMAL, "billed_cost"),
    "EffectiveCost": (DECIMAL, "billed_cost"),
    "ListCost": (DECIMAL, "list_cost"),
    "ContractedCost": (DECIMAL, "contracted_cost"),
    "ListUnitPrice": (DECIMAL, "list_price"),
    "ContractedUnitPrice": (DECIMAL, "contracted_price"),
    "PricingCategory": (TEXT, _if_priced("'Standard'")),
    "PricingQuantity": (DECIMAL, _if_priced(_QUANTITY)),
    "PricingUnit": (TEXT, _if_priced(f"if({_TOKENS}, '1000000 Tokens', '1000 Requests')")),
    "PricingCurrency": (TEXT, "currency"),
    "PricingCurrencyContractedUnitPrice": (DECIMAL, "contracted_price"),
    "PricingCurrencyEffectiveCost": (DECIMAL, "billed_cost"),
    "PricingCurrencyListUnitPrice": (DECIMAL, "list_price"),
    "BillingCurrency": (TEXT, "currency"),
    "ConsumedQuantity": (DECIMAL, _if_priced(f"quantity::{_WHOLE}")),
    "ConsumedUnit": (
        TEXT,
        _if_priced(f"if({_FEE}, 'Fee ', '') || if({_TOKENS}, 'Tokens', 'Requests')"),
    ),
    "ServiceName": (TEXT, "'Model inference'"),
    "ServiceCategory": (TEXT, "'AI and Machine Learning'"),
    "ServiceSubcategory": (TEXT, "'Generative AI'"),
    "SkuId": (NAME, _SKU),
    "SkuMeter": (TEXT, f"if({_FEE}, 'Platform fee on ', '') || token_type"),
    "SkuPriceId": (NAME, _if_priced(_TIER)),
    "SkuPriceDetails": (TEXT, _if_priced(_DETAILS)),
    "ResourceId": (TEXT, "NULL"),
    "ResourceName": (TEXT, "NULL"),
    "ResourceType": (TEXT, "NULL"),
    "RegionId": (NAME, "nullif(geo, 'global')"),
    "RegionName": (NAME, "nullif(geo, 'global')"),
    "AvailabilityZone": (TEXT, "NULL"),
    "CommitmentDiscountId": (TEXT, "NULL"),
    "CommitmentDiscountName": (TEXT, "NULL"),
    "CommitmentDiscountCategory": (TEXT, "NULL"),
    "CommitmentDiscountType": (TEXT, "NULL"),
    "CommitmentDiscountStatus": (TEXT, "NULL"),
    "CommitmentDiscountQuantity": (DECIMAL, "NULL"),
    "CommitmentDiscountUnit": (TEXT, "NULL"),
    "CapacityReservationId": (TEXT, "NULL"),
    "CapacityReservationStatus": (TEXT, "NULL"),
    "Tags": (TEXT, "tags"),
}
_FROM_1_3 = {
    "ContractApplied": (TEXT, "NULL"),
    "AllocatedMethodId": (TEXT, "NULL"),
    "AllocatedMethodDetails": (TEXT, "NULL"),
    "AllocatedResourceId": (TEXT, "NULL"),
    "AllocatedResourceName": (TEXT, "NULL"),
    "AllocatedTags": (TEXT, "NULL"),
}
_FROM_1_4 = {"InvoiceDetailId": (TEXT, "NULL"), "CommitmentProgramEligibilityDetails": (TEXT, "NULL")}
_OWN: Mapping[str, tuple[str, str]] = {
    "x_TokenType": (TEXT, "token_type"),
    "x_Model": (NAME, "nullif(model, '')"),
    "x_Quantity": (DECIMAL, f"quantity::{_WHOLE}"),
    "x_Funding": (TEXT, "funding"),
    "x_Charge": (TEXT, "charge"),
    "x_Quality": (TEXT, "quality"),
    "x_Flags": (TEXT, "nullif(flags, '')"),
    "x_Unpriced": (TEXT, "nullif(unpriced, '')"),
    "x_Corrects": (TEXT, "nullif(corrects, '')"),
    "x_PriceSource": (TEXT, "nullif(price_source, '')"),
    "x_PriceDigest": (TEXT, "nullif(price_digest, '')"),
    "x_Epoch": (TEXT, "epoch"),
    "x_Shard": (WHOLE, "shard"),
    "x_FirstSeq": (WHOLE, "first_n"),
    "x_LastSeq": (WHOLE, "last_n"),
}


def columns_of(version: Version) -> dict[str, tuple[str, str]]:
    """The columns of a version, in order: what kind each is, and the SQL it is made by."""
    who = {**(_WHO_BEFORE_1_4 if version < "1.4" else {}), **(_WHO_FROM_1_3 if version > "1.2" else {})}
    later = {**(_FROM_1_3 if version > "1.2" else {}), **(_FROM_1_4 if version > "1.3" else {})}
    return {**who, **_COMMON, **later, **_OWN}


def as_value(kind: str, how: str) -> str:
    """SQL of a column of a Parquet file: decimals are exact, and moments are in UTC."""
    if kind == DECIMAL:
        return f"({how})::DECIMAL(38,12)"
    return f"({how})::{kind}"


def as_text(kind: str, how: str) -> str:
    """SQL of a column of a CSV file: numbers without needless zeros, and no text that a spreadsheet would execute."""
    if kind == DECIMAL:
        return f"rtrim(rtrim(({how})::DECIMAL(38,12)::VARCHAR, '0'), '.')"
    if kind == MOMENT:
        return f"strftime({how}, '%Y-%m-%dT%H:%M:%SZ')"
    if kind == NAME:
        text = f"({how})::VARCHAR"
        return f"if(left(ltrim({text}), 1) IN ({_FORMULA}), {quoted(chr(39))} || {text}, {text})"
    return f"({how})::VARCHAR"


_FORMULA = ", ".join(f"chr({ord(mark)})" for mark in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""What makes a cell a formula, in full width too."""
