"""The looks of pages: on a light and a dark screen, and on paper."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--soft:#f5f6f8;--ink:#1c2430;--faint:#5b6675;--line:#dde2e9;--warn:#8a4b00;
--warn-back:#fff4e0;--c1:#3569b8;--c2:#d08a1e;--c3:#2d9d86;--c4:#8357c5;--c5:#98a2b0}
@media(prefers-color-scheme:dark){:root{--paper:#12161c;--soft:#1b212a;--ink:#e6eaf0;--faint:#9aa6b5;--line:#2e3744;
--warn:#ffca7a;--warn-back:#33270f;--c1:#6d9dea;--c2:#e8aa4c;--c3:#4fc3aa;--c4:#af8bea;--c5:#6f7a89}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.5rem 3rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.15rem;margin:0 0 .6rem}
p{margin:.3rem 0}
.meta,.note,caption,footer{color:var(--faint)}
.warn{background:var(--warn-back);color:var(--warn);padding:.5rem .8rem;border-radius:.4rem;margin:.8rem 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.8rem;margin:1.4rem 0;padding:0;
list-style:none}
.tiles li{background:var(--soft);border-radius:.5rem;padding:.7rem .9rem}
.tiles b{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tiles span{display:block;color:var(--faint);font-size:.87rem}
section{margin:2.2rem 0 0}
.chart{display:block;width:100%;height:auto}
@media screen and (max-width:44rem){body{padding:1.2rem .9rem 2rem}.chart{width:44rem}}
.chart text{fill:var(--faint);font-size:12px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}.zero{stroke:var(--faint)}
.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}.c5{fill:var(--c5)}
.l1,.l2,.l3,.l4,.l5{fill:none;stroke-width:2;stroke-linejoin:round}
.l1{stroke:var(--c1)}.l2{stroke:var(--c2)}.l3{stroke:var(--c3)}.l4{stroke:var(--c4)}.l5{stroke:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:0 0 .4rem;padding:0;list-style:none;font-size:.9rem}
.swatch{width:.75em;height:.75em;margin-right:.45em}
.share{width:5rem;height:.5rem;vertical-align:middle}.track{fill:var(--line)}
.part{display:inline-block;min-width:3.6em}
.scroll{overflow:auto;margin-top:.6rem}
.tall .scroll{overflow:visible;margin:0}.tall{max-height:18.3rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;font-size:.87rem;padding:0 0 .3rem}
th,td{padding:.28rem .6rem;text-align:right;border-top:1px solid var(--line);vertical-align:baseline;white-space:nowrap}
th:first-child{text-align:left;padding-left:0}td:last-child,th:last-child{padding-right:0}
thead th{border-top:0;color:var(--faint);font-weight:600;vertical-align:bottom}
.tall thead th{position:sticky;top:0;background:var(--paper)}
tbody th{font-weight:400;white-space:normal;overflow-wrap:anywhere;min-width:9rem}
td.text,th.text{text-align:left}td.text{white-space:normal}
tfoot th,tfoot td{border-top:2px solid var(--faint);font-weight:600}
footer{margin-top:2.4rem;padding-top:.8rem;border-top:1px solid var(--line);font-size:.87rem}
footer p{overflow-wrap:anywhere}
@media print{
:root{--paper:#fff;--soft:#f5f6f8;--ink:#000;--faint:#444;--line:#ccc;--warn:#5a3000;--warn-back:#fff;--c1:#3569b8;
--c2:#d08a1e;--c3:#2d9d86;--c4:#8357c5;--c5:#98a2b0}
@page{size:A4;margin:14mm 13mm}
body{padding:0;max-width:none;font-size:10pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}
section{margin-top:1.4rem}
.scroll,.tall{overflow:visible;max-height:none}
.tiles{grid-template-columns:repeat(4,1fr);gap:.5rem}.tiles b{font-size:1.1rem}
h2,thead{break-after:avoid}.figure,.tiles,tr{break-inside:avoid}
thead{display:table-header-group}tfoot{display:table-row-group}.tall thead th{position:static}
table{font-size:8.5pt}th,td{padding:.18rem .35rem}.warn{border:1px solid}
footer{font-size:8pt;margin-top:1.2rem;break-inside:avoid}caption{font-size:8pt}
}
"""

INVOICE_STYLE = """
.letter{display:grid;grid-template-columns:1fr 1fr;gap:1.5rem;margin:1.2rem 0 1.6rem}
.letter dl{display:grid;grid-template-columns:auto 1fr;gap:.1rem 1rem;margin:0}
dt{color:var(--faint)}dd{margin:0;text-align:right}
.due{font-size:1.5rem;font-weight:600}
"""
