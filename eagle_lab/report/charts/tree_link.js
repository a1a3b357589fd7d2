// In JupyterLab: the mouse on a row of the tree mask, or on a node, lights up that node's path in the draft tree; and
// labels are cut to the room that they have at the page's width.
// It works on plotly's own picture by the chart's own scales, so it needs no kernel and no further package: plotly's
// library is out of reach of a script in a notebook, and a `FigureWidget` is megabytes a chart and blank until trusted.
// mark: the id of an element in the chart's output; paint: the colour of the path.
(mark, paint) => {
  const area = document.getElementById(mark).closest(".jp-OutputArea") || document.body;
  const shape = (parent, kind, set) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const key in set) made.setAttribute(key, set[key]);
    parent.appendChild(made);
  };
  const attach = (chart) => {
    const {parents, room} = chart.layout.meta, nodes = chart.data.find((trace) => trace.name === "nodes");
    const plain = nodes.text.map((text) => new DOMParser().parseFromString(text || "", "text/html").body.textContent);
    const clear = () => {
      chart.querySelectorAll(".eagle-path").forEach((made) => made.remove());
      chart.querySelectorAll(".subplot.xy .scatterlayer").forEach((layer) => { layer.style.opacity = 1; });
    };
    const fit = () => {
      const x = chart._fullLayout.xaxis, traces = chart.querySelectorAll(".subplot.xy .scatterlayer .trace");
      const drawn = traces[traces.length - 1].querySelectorAll(".textpoint text");
      // plotly draws a text for each point that has one and is in view, in the points' order
      let at = 0;
      for (const text of drawn) {
        const shown = text.dataset.whole || text.textContent;
        while (at < plain.length && plain[at] !== shown) at++;
        if (at === plain.length) return;
        text.dataset.whole = shown;
        const from = x.c2p(nodes.x[at]), size = nodes.marker.size[at] / 2 + 4;
        const most = (room[at] === null ? x._length - from : (x.c2p(room[at]) - x.c2p(0))) - size;
        const bold = nodes.text[at].startsWith("<b>");
        for (let keep = shown.length; keep > 0 && text.getComputedTextLength() > most; keep--) {
          text.textContent = shown.slice(0, keep - 1) + "…";
          if (bold) text.style.fontWeight = "bold";
        }
        at++;
      }
    };
    const show = (node) => {
      clear();
      const path = [];
      for (let at = node; at >= 0; at = parents[at]) path.unshift(at);
      const full = chart._fullLayout;
      const left = chart.querySelector(".subplot.xy .scatterlayer").parentNode;
      const right = chart.querySelector(".subplot.x2y2 .heatmaplayer").parentNode;
      const spot = (n) => [full.xaxis.c2p(nodes.x[n]), full.yaxis.c2p(nodes.y[n])];
      chart.querySelectorAll(".subplot.xy .scatterlayer").forEach((layer) => { layer.style.opacity = 0.35; });
      shape(left, "polyline", {class: "eagle-path", "data-nodes": path.join(" "), points: path.map((n) => spot(n).join(",")).join(" "),
        fill: "none", stroke: paint, "stroke-width": 4, "stroke-linejoin": "round"});
      for (const n of path) shape(left, "circle", {class: "eagle-path", cx: spot(n)[0], cy: spot(n)[1], r: 6, fill: paint});
      for (const n of path) {
        shape(left, "text", {class: "eagle-path", x: spot(n)[0] + 9, y: spot(n)[1] - 7, fill: paint,
          "font-size": 13, "font-weight": "bold"});
        left.lastChild.textContent = chart.layout.meta.labels[n];
      }
      const top = full.yaxis2.c2p(node - 0.5), below = full.yaxis2.c2p(node + 0.5);
      shape(right, "rect", {class: "eagle-path", x: 0, y: Math.min(top, below), width: full.xaxis2._length, height: Math.abs(below - top),
        fill: "none", stroke: paint, "stroke-width": 2});
    };
    chart.on("plotly_hover", (event) => {
      const point = event.points[0], type = point.data.type;
      if (type === "heatmap") show(point.y);
      else if (point.data.name === "nodes") show(point.pointNumber);
    });
    chart.on("plotly_unhover", clear);
    chart.on("plotly_afterplot", fit);
    fit();
  };
  let tries = 0;
  const timer = setInterval(() => {
    const chart = area.querySelector(".js-plotly-plot");
    const ready = chart && chart.on && chart._fullLayout && chart.layout.meta;
    if (ready || ++tries > 600) clearInterval(timer);
    if (ready) attach(chart);
  }, 100);
}
