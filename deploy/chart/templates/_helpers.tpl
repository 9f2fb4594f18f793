{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{- define "tarn.selector" -}}
app.kubernetes.io/name: tarn
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tarn.labels" -}}
{{ include "tarn.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "tarn.name" -}}
{{- if eq .Release.Name "tarn" }}tarn{{ else }}{{ printf "%s-tarn" .Release.Name | trunc 63 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "tarn.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end }}

{{/* tarn's configuration: what the values say, and the keys that are the chart's. */}}
{{- define "tarn.config" -}}
{{- $own := dict "listen" (printf "127.0.0.1:%v" .Values.ports.registry) "admin_listen" (printf "127.0.0.1:%v" .Values.ports.admin) "admin_socket" "/run/tarn/admin.sock" "dir" "/var/lib/tarn" -}}
{{- if .Values.metrics.enabled }}{{ $_ := set $own "metrics_listen" (printf "%s:%v" .Values.metrics.address .Values.metrics.port) }}{{ end -}}
{{- range $key, $_ := $own }}{{ if hasKey $.Values.config $key }}{{ fail (printf "config.%s is the chart's: see ports, metrics and dataDir" $key) }}{{ end }}{{ end -}}
{{- if hasKey .Values.config "metrics_listen" }}{{ fail "config.metrics_listen is the chart's: see metrics" }}{{ end -}}
{{ mergeOverwrite (deepCopy .Values.config) $own | toYaml }}
{{- end }}
